"""Optimisers of bitsandbytes with a state that safetensors can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from bitsandbytes.optim.optimizer import Optimizer8bit as Base
else:
    Base = object


class FlatState(Base):
    """Put before a bitsandbytes class: its ``state_dict`` then maps each parameter to plain numbers and own tensors.

    By itself the library nests the tensors one level deeper, and all parameters share their quantisation maps.
    """

    def state_dict(self) -> dict[str, Any]:
        plain = torch.optim.Optimizer.state_dict(self)
        plain["state"] = {
            parameter: {key: value.clone() if key.startswith("qmap") else value for key, value in state.items()}
            for parameter, state in plain["state"].items()
        }
        return plain
