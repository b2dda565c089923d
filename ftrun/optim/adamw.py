"""Adam with decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ftrun.optim.base import OptimizerConfig
from ftrun.registry import register


@register("optim", "adamw")
@dataclass
class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019, arXiv:1711.05101).

    ``m`` and ``v`` are running means of the gradient and of its square, freed of their start at zero:
    ``p <- (1 - lr * weight_decay) * p - lr * m / (sqrt(v) + eps)``.
    """

    beta1: float = 0.9  # memory of the mean gradient
    beta2: float = 0.999  # memory of the mean squared gradient
    eps: float = 1e-8  # added to the root of the mean square

    def build(self, named_parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        # one kernel for the whole update: fewer passes over memory, and it exists for these devices only
        fused = all(p.device.type in ("cpu", "cuda") for _, p in named_parameters)
        groups = self.groups(named_parameters)
        return torch.optim.AdamW(groups, betas=(self.beta1, self.beta2), eps=self.eps, fused=fused)

    def state_bytes(self) -> float:
        return 8.0  # m and v
