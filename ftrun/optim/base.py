"""What an optimiser component is: knobs, and how it is built from named parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.errors import ConfigError

if TYPE_CHECKING:
    from bitsandbytes.optim.optimizer import Optimizer8bit as Base
    from torch import nn
    from torch.optim import Optimizer
else:
    Base = object


@dataclass
class OptimizerConfig:
    needs: ClassVar[dict[str, str]] = {}
    lacks: ClassVar[dict[str, str]] = {}

    learning_rate: float = 2e-4  # peak learning rate
    weight_decay: float = 0.0  # decoupled weight decay; not applied to norms and biases

    def build(self, named_parameters: list[tuple[str, nn.Parameter]]) -> Optimizer:
        """The optimiser over these trainable parameters, each group with its peak `lr`."""
        raise NotImplementedError

    def groups(self, named_parameters: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Two parameter groups: matrices with weight decay, vectors (norms, biases, IA3 scales) without.

        A group without a parameter is left out. Raises ConfigError where nothing at all is trainable.
        """
        if not named_parameters:
            raise ConfigError("there is nothing to train: no parameter is trainable", "", "Choose another adapter.")
        matrices = [p for _, p in named_parameters if p.ndim >= 2]
        vectors = [p for _, p in named_parameters if p.ndim < 2]
        both = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return [group | {"lr": self.learning_rate} for group in both if group["params"]]

    def state_bytes(self) -> float:
        """Bytes of optimiser state for one trainable parameter, for `ftrun plan`."""
        return 8.0


class FlatState(Base):
    """Put before a bitsandbytes class: its ``state_dict`` then maps each parameter to plain numbers and own tensors.

    By itself the library nests the tensors one level deeper, and all parameters share their quantisation maps.
    """

    def state_dict(self) -> dict[str, Any]:
        from torch.optim import Optimizer

        plain = Optimizer.state_dict(self)
        plain["state"] = {
            parameter: {key: value.clone() if key.startswith("qmap") else value for key, value in state.items()}
            for parameter, state in plain["state"].items()
        }
        return plain
