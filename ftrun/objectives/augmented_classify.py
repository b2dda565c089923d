"""Sequence classification with mixed sentence vectors and a contrastive term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftrun.data.batches import Batch
from ftrun.errors import ConfigError
from ftrun.models.wrappers import unwrap
from ftrun.objectives.base import Kind, Objective
from ftrun.registry import register
from ftrun.training.parts import Loss
from ftrun.training.view import StepView

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@register("objective", "augmented_classify")
@dataclass
class AugmentedClassify(Objective):
    """Classification from little data, as augmentation helps it (Obadinma et al., 2023, arXiv:2303.02577).

    mixup (Zhang et al., 2018, arXiv:1710.09412): lambda ~ Beta(a, a); the head reads lambda v_i + (1 - lambda) v_j of
    two sentence vectors, and the loss is lambda CE(y_i) + (1 - lambda) CE(y_j). contrastive (Khosla et al., 2020,
    arXiv:2004.11362): c times the mean over rows of -mean over p of log(exp(z_i z_p / t) / sum over a of
    exp(z_i z_a / t)), z of unit length, p the other rows of the same label, a all other rows. Rows meet within a
    micro-batch: raise train.batch_tokens where a step is cut into several.
    """

    lacks: ClassVar[dict[str, str]] = {"token_loss": "has one loss a row"}
    kind: ClassVar[Kind] = "labels"

    mixup: float = 0.2  # a of Beta(a, a), for the share of a row in its mix; 0: no mixing
    contrastive: float = 0.0  # weight of the contrastive term (c); 0: none
    temperature: float = 0.1  # of the contrastive term (t)

    def __post_init__(self) -> None:
        if self.mixup < 0 or self.contrastive < 0 or self.temperature <= 0:
            raise ConfigError(
                "objective.mixup and objective.contrastive are 0 or more, objective.temperature is above 0",
                f"mixup={self.mixup:g} contrastive={self.contrastive:g} temperature={self.temperature:g}",
            )

    def attach(self, bundle: Bundle, ctx: Context) -> None:
        """Nothing is attached; the run's seed draws the mixes."""
        self.seed = ctx.seed

    def count(self, batch: Batch) -> float:
        return float(batch.rows)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Rows that have another one of their label beside them."""
        return {"anchors": float((_positives(batch.label).any(1)).sum())} if self.contrastive else {}

    def loss(self, view: StepView) -> Loss:
        labels = view.batch.label
        vectors, logits, head = sentence_vectors(view)
        parts = {"accuracy": (logits.argmax(-1) == labels).float().sum()}
        if self.mixup:
            shares, partners = self.mix(view)
            value = mixed_loss(vectors, labels, shares.to(vectors), partners.to(labels.device), head)
        else:
            value = F.cross_entropy(logits.float(), labels, reduction="sum")
        if self.contrastive:
            near = contrastive_sum(vectors.float(), labels, self.temperature)
            near = near * view.counts["loss"] / max(view.counts["anchors"], 1.0)
            parts["contrastive"] = near.detach()
            value = value + self.contrastive * near
        return Loss(value, parts)

    def mix(self, view: StepView) -> tuple[Tensor, Tensor]:
        """lambda of every row, and the row that it is mixed with, (rows,) each; drawn for the step and its rows."""
        random = np.random.default_rng([self.seed, view.step, *view.batch.table_index.tolist()])
        shares = random.beta(self.mixup, self.mixup, view.batch.rows)
        return torch.from_numpy(shares), torch.from_numpy(random.permutation(view.batch.rows))


def mixed_loss(vectors: Tensor, labels: Tensor, shares: Tensor, partners: Tensor, head: nn.Module) -> Tensor:
    """Summed mixup loss of sentence vectors (rows, ...) with these shares and partners, (rows,) each."""
    wide = shares.view(-1, *[1] * (vectors.ndim - 1))
    logits = head(wide * vectors + (1 - wide) * vectors[partners]).float()
    own, other = (F.cross_entropy(logits, wanted, reduction="none") for wanted in (labels, labels[partners]))
    return (shares * own + (1 - shares) * other).sum()


def contrastive_sum(vectors: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss of sentence vectors (rows, ...), summed over the rows that have a positive."""
    positives = _positives(labels)
    z = F.normalize(vectors.flatten(1), dim=1)
    near = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_share = near - near.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    counts = positives.sum(1)
    anchors = counts > 0
    if not anchors.any():
        return vectors.sum() * 0
    return -((log_share * positives).sum(1)[anchors] / counts[anchors]).sum()


def sentence_vectors(view: StepView) -> tuple[Tensor, Tensor, nn.Module]:
    """What the classification head reads of each row, the logits, and the head itself.

    A head over all tokens (language models) counts at the last token; one that takes the first token itself is given
    that alone, (rows, 1, width); else it is the pooled vector, (rows, width).
    """
    assert view.architecture.head_name is not None
    head = unwrap(view.model).get_submodule(view.architecture.head_name)
    kept: list[tuple[Tensor, Tensor]] = []
    handle = head.register_forward_hook(lambda *call: kept.append((call[1][0], call[2])))
    try:
        logits = view.class_logits
    finally:
        handle.remove()
    read, said = kept[-1]
    if said.ndim == 3:
        last = view.batch.attention_mask.sum(1) - 1 + read.shape[1] - view.batch.input_ids.shape[1]
        return read[torch.arange(len(read), device=read.device), last], logits, head
    return (read[:, :1] if read.ndim == 3 else read), logits, head


def _positives(labels: Tensor) -> Tensor:
    """Pairs of different rows with one label, (rows, rows) bool."""
    same = labels[:, None] == labels[None, :]
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
