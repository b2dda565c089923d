"""Supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ftrun.data.batches import Batch
from ftrun.objectives.base import Kind, Loss, Objective
from ftrun.registry import register
from ftrun.training.view import StepView


@register("objective", "sft")
@dataclass
class Sft(Objective):
    """Cross-entropy on the response tokens, each with its loss weight: sum of w_t * nll_t over the number of trained tokens.

    The divisor counts tokens of weight above 0 in the whole optimiser step, over all processes and micro-batches.
    """

    kind: ClassVar[Kind] = "sft"
    packs: ClassVar[bool] = True

    def count(self, batch: Batch) -> float:
        return float(batch.trained_tokens)

    def loss(self, view: StepView) -> Loss:
        return Loss((view.weights * view.token_nll).sum())
