"""AdamW whose state may leave the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from bitsandbytes.optim.adamw import AdamW
from torch import nn

from ftrun.optim.base import FlatState, OptimizerConfig
from ftrun.registry import register


@register("optim", "paged_adamw")
@dataclass
class PagedAdamW(OptimizerConfig):
    """AdamW with its state in unified memory (Dettmers et al., 2023, arXiv:2305.14314).

    The driver moves pages of state to the CPU when the GPU runs out, and back for the step; the update is AdamW's own.
    On a CPU there is nothing to page, and the state is ordinary memory.
    """

    needs: ClassVar[dict[str, str]] = {"whole_weights": "updates whole weights only"}

    beta1: float = 0.9  # memory of the mean gradient
    beta2: float = 0.999  # memory of the mean squared gradient
    eps: float = 1e-8  # added to the root of the mean square
    bits: Literal[32, 8] = 32  # bits of each of the two running means

    def build(self, named_parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return FlatPagedAdamW(
            self.groups(named_parameters),
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            optim_bits=self.bits,
            is_paged=any(p.is_cuda for _, p in named_parameters),
        )

    def state_bytes(self) -> float:
        return 8.0 if self.bits == 32 else 2 * (1 + 4 / 256)


class FlatPagedAdamW(FlatState, AdamW):
    """bitsandbytes' AdamW with a flat state."""
