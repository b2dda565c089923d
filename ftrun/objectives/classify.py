"""Sequence classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from ftrun.data.batches import Batch
from ftrun.objectives.base import Kind, Objective
from ftrun.registry import register
from ftrun.training.parts import Loss
from ftrun.training.view import StepView


@register("objective", "classify")
@dataclass
class Classify(Objective):
    """Cross-entropy of one label a row, on the logits of the model's classification head."""

    lacks: ClassVar[dict[str, str]] = {"token_loss": "has one loss a row"}
    kind: ClassVar[Kind] = "labels"

    label_smoothing: float = 0.0  # probability mass spread over the other labels

    def count(self, batch: Batch) -> float:
        return float(batch.rows)

    def loss(self, view: StepView) -> Loss:
        logits = view.class_logits
        labels = view.batch.label
        value = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=self.label_smoothing)
        return Loss(value, {"accuracy": (logits.argmax(-1) == labels).float().sum()})
