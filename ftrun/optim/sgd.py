"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ftrun.errors import ConfigError
from ftrun.optim.base import OptimizerConfig
from ftrun.registry import register


@register("optim", "sgd")
@dataclass
class Sgd(OptimizerConfig):
    """Gradient descent with momentum: ``m <- momentum * m + g``, ``p <- p - lr * m``.

    Nesterov's variant steps by ``g + momentum * m`` instead.
    """

    learning_rate: float = 1e-2  # peak learning rate
    weight_decay: float = 0.0  # added to the gradient as weight_decay * p, before the momentum; not on norms and biases
    momentum: float = 0.9  # memory of past gradients; 0 keeps no state
    nesterov: bool = False  # look ahead along the momentum

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            where = "optim.nesterov=true optim.momentum=0"
            raise ConfigError("Nesterov's step needs a momentum", where, "Set optim.momentum=0.9.")

    def build(self, named_parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.groups(named_parameters), momentum=self.momentum, nesterov=self.nesterov)

    def state_bytes(self) -> float:
        return 4.0 if self.momentum else 0.0
