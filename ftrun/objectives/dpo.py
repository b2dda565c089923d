"""Direct preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F

from ftrun.data.batches import Batch
from ftrun.objectives.base import Kind, Objective
from ftrun.registry import register
from ftrun.training.parts import Loss
from ftrun.training.view import StepView


@register("objective", "dpo")
@dataclass
class Dpo(Objective):
    """Prefer the chosen response over the rejected one, relative to the untrained model (Rafailov et al., 2023, arXiv:2305.18290).

    With ``h = log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l)``, summed over response tokens:
    sigmoid ``-(1 - eps) log sigma(beta h) - eps log sigma(-beta h)``;
    ipo ``(h - 1 / (2 beta))^2`` with length-averaged log-probabilities (Azar et al., 2023, arXiv:2310.12036).
    """

    lacks: ClassVar[dict[str, str]] = {"token_loss": "compares whole responses"}
    kind: ClassVar[Kind] = "pairs"
    uses_reference: ClassVar[bool] = True

    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"  # form of the loss
    beta: float = 0.1  # strength of the pull towards the reference
    label_smoothing: float = 0.0  # share of pairs whose order is taken to be wrong (eps; sigmoid only)

    def count(self, batch: Batch) -> float:
        return float(batch.rows)

    def loss(self, view: StepView) -> Loss:
        gain = -(view.token_nll - view.reference_nll) * view.weights  # log pi - log ref of each token
        per_sequence = view.per_sequence_sum(gain)
        if self.loss_type == "ipo":
            per_sequence = per_sequence / view.per_sequence_sum((view.weights > 0).to(gain.dtype)).clamp(min=1)
        chosen, rejected = per_sequence[0::2], per_sequence[1::2]
        h = chosen - rejected
        if self.loss_type == "ipo":
            value = (h - 1 / (2 * self.beta)).square().sum()
        else:
            eps = self.label_smoothing
            value = -((1 - eps) * F.logsigmoid(self.beta * h) + eps * F.logsigmoid(-self.beta * h)).sum()
        parts = {
            "reward_chosen": (self.beta * chosen).sum().detach(),
            "reward_rejected": (self.beta * rejected).sum().detach(),
            "reward_accuracy": (h > 0).float().sum(),
        }
        return Loss(value, parts)
