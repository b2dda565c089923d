"""Supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ftrun.objectives.base import Kind, TokenLoss
from ftrun.registry import register


@register("objective", "sft")
@dataclass
class Sft(TokenLoss):
    """Cross-entropy on the response tokens, each with its loss weight: sum of w_t * nll_t over the number of trained tokens.

    The divisor counts tokens of weight above 0 in the whole optimiser step, over all processes and micro-batches.
    """

    kind: ClassVar[Kind] = "sft"
