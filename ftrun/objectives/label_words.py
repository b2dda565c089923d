"""Classification by a language model's own words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ftrun.data.batches import Batch
from ftrun.data.tokens import TokenTable, first_places
from ftrun.errors import DataError
from ftrun.objectives.base import Kind, Objective
from ftrun.registry import register
from ftrun.training.parts import Loss
from ftrun.training.view import StepView

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@register("objective", "label_words")
@dataclass
class LabelWords(Objective):
    """Cross-entropy over the label words alone (Chen et al., 2022, arXiv:2110.07814).

    The loss of a row is ``-log softmax`` of its label among the first tokens of all responses of its task, at the
    position that predicts the response; no other token is trained. Tasks are what the token policy remembers as "task";
    without it all rows are one. The loss of a step is the mean over its rows.
    """

    lacks: ClassVar[dict[str, str]] = {"token_loss": "has one loss a row"}
    kind: ClassVar[Kind] = "sft"
    packs: ClassVar[bool] = True

    def attach(self, bundle: Bundle, ctx: Context) -> nn.Module | None:
        """Find the label words of every task in the training rows. Raises DataError when no task has two."""
        assert ctx.train_tokens is not None
        found = words_of(ctx.train_tokens)
        single = [task for task, words in found.items() if len(words) < 2]
        if len(single) == len(found):
            raise DataError(
                "objective=label_words tells label words apart, and all responses begin with the same token",
                f"data.path={ctx.settings.data.path}",
                "Give rows of at least two labels that begin differently.",
            )
        if single:
            ctx.report.warn(f"{len(single)} of {len(found)} tasks have one label only: they teach nothing")
        self._words = {task: torch.from_numpy(words).to(bundle.device) for task, words in found.items()}
        return None

    def count(self, batch: Batch) -> float:
        return float(first_targets(batch).sum())

    def loss(self, view: StepView) -> Loss:
        batch = view.batch
        first = first_targets(batch)
        if not first.any():
            return Loss(view.hidden.sum() * 0)
        logits = view.architecture.head(view.model).logits(view.hidden[first]).float()
        gold = batch.target_ids[first]
        tasks = batch.remembered_targets("task")[first] if "task" in batch.remembered else torch.zeros_like(gold)
        nll, right = torch.zeros_like(logits[:, 0]), torch.zeros_like(logits[:, 0])
        for task in tasks.unique().tolist():
            rows = (tasks == task).nonzero().squeeze(1)
            own = logits[rows][:, self._words[int(task)]]
            target = (self._words[int(task)] == gold[rows, None]).int().argmax(1)
            nll = nll.index_put((rows,), nn.functional.cross_entropy(own, target, reduction="none"))
            right[rows] = (own.argmax(1) == target).float()
        return Loss((nll * view.weights[first]).sum(), {"accuracy": right.sum()})


def first_targets(batch: Batch) -> Tensor:
    """Mask of the trained tokens that are the first of their sequence, (tokens,)."""
    sequence = batch.target_sequence
    first = torch.ones_like(sequence, dtype=torch.bool)
    first[1:] = sequence[1:] != sequence[:-1]
    return first


def words_of(table: TokenTable) -> dict[int, np.ndarray]:
    """First tokens of the responses of every task, sorted."""
    places = first_places(table)
    tasks = table.remembered["task"][places].astype(int) if "task" in table.remembered else np.zeros(len(places), int)
    return {int(task): np.unique(table.input_ids[places[tasks == task]]).astype(np.int64) for task in np.unique(tasks)}
