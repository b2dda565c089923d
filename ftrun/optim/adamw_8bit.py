"""AdamW with a state in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from bitsandbytes.optim.adamw import AdamW8bit as BitsandbytesAdamW8bit
from torch import nn

from ftrun.optim.base import FlatState, OptimizerConfig
from ftrun.registry import register


@register("optim", "adamw_8bit")
@dataclass
class AdamW8bit(OptimizerConfig):
    """AdamW whose two running means are stored in 8 bits (Dettmers et al., 2022, arXiv:2110.02861).

    Blocks of 256 values share one scale. Parameters of fewer than ``min_8bit_size`` elements keep 32 bits.
    """

    needs: ClassVar[dict[str, str]] = {"whole_weights": "packs the state of a whole weight in blocks"}

    beta1: float = 0.9  # memory of the mean gradient
    beta2: float = 0.999  # memory of the mean squared gradient
    eps: float = 1e-8  # added to the root of the mean square
    min_8bit_size: int = 4096  # smaller parameters keep their state in 32 bits

    def build(self, named_parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups, betas = self.groups(named_parameters), (self.beta1, self.beta2)
        return FlatAdamW8bit(groups, betas=betas, eps=self.eps, min_8bit_size=self.min_8bit_size)

    def state_bytes(self) -> float:
        return 2 * (1 + 4 / 256)  # m and v, a byte each, and a float32 scale for every block of 256


class FlatAdamW8bit(FlatState, BitsandbytesAdamW8bit):
    """bitsandbytes' AdamW8bit with a flat state."""
