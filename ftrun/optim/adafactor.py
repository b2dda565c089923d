"""AdamW's second moment in two vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers.optimization import Adafactor as TransformersAdafactor

from ftrun.optim.base import OptimizerConfig
from ftrun.registry import register


@register("optim", "adafactor")
@dataclass
class Adafactor(OptimizerConfig):
    """Adam with the mean squares of a matrix kept as rows and columns (Shazeer and Stern, 2018, arXiv:1804.04235).

    ``v = rows * columns / mean(rows)``, remembered with ``beta2 = 1 - step ** decay_rate``. The update
    ``g / sqrt(v)`` is scaled down where its root mean square exceeds ``clip_threshold``. The learning rate is the
    schedule's, not the paper's relative step size.
    """

    needs: ClassVar[dict[str, str]] = {"whole_weights": "factors the second moment of a whole matrix"}

    scale_parameter: bool = False  # scale the learning rate with the size of each parameter, as the paper does
    clip_threshold: float = 1.0  # largest root mean square of an update, before the learning rate
    decay_rate: float = -0.8  # exponent of the memory of squared gradients
    beta1: float | None = None  # memory of the mean update; null keeps none

    def build(self, named_parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return TransformersAdafactor(
            self.groups(named_parameters),
            lr=self.learning_rate,
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            beta1=self.beta1,
            scale_parameter=self.scale_parameter,
            relative_step=False,
        )

    def state_bytes(self) -> float:
        # rows and columns of a rank-8 matrix, the worst of the common shapes; a square matrix takes almost nothing
        factors = 4 * (1 / 8 + 1 / 1024)
        return factors if self.beta1 is None else factors + 4.0
