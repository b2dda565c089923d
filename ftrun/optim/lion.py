"""The sign of a momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from bitsandbytes.optim.lion import Lion32bit
from torch import nn

from ftrun.optim.base import FlatState, OptimizerConfig
from ftrun.registry import register


@register("optim", "lion")
@dataclass
class Lion(OptimizerConfig):
    """Every weight moves by the learning rate, in the direction of a momentum (Chen et al., 2023, arXiv:2302.06675).

    ``p <- (1 - lr * weight_decay) * p - lr * sign(beta1 * m + (1 - beta1) * g)``, then
    ``m <- beta2 * m + (1 - beta2) * g``. The paper advises a learning rate 3 to 10 times smaller than AdamW's.
    """

    needs: ClassVar[dict[str, str]] = {"whole_weights": "updates whole weights only"}

    learning_rate: float = 3e-5  # peak learning rate
    beta1: float = 0.9  # share of the momentum in the direction of a step
    beta2: float = 0.99  # memory of the momentum

    def build(self, named_parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return FlatLion(self.groups(named_parameters), betas=(self.beta1, self.beta2))

    def state_bytes(self) -> float:
        return 4.0  # m


class FlatLion(FlatState, Lion32bit):
    """bitsandbytes' Lion32bit with a flat state."""
