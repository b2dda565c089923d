"""Accuracy and F1 of a sequence classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ftrun.data.batches import collate, length_sorted, token_budget
from ftrun.data.tokens import TokenTable
from ftrun.errors import DataError
from ftrun.evaluation.averages import macro_f1
from ftrun.evaluation.base import Evaluation, Evaluator, Metric, nothing_held_out
from ftrun.registry import register

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@register("eval", "classification")
@dataclass
class Classification(Evaluator):
    """How often the model gives a held-out row its label.

    ``accuracy`` is the share of right labels; ``macro_f1`` the mean of the F1 of every class that occurs among the
    labels or the answers, each class counting alike; ``loss`` the mean cross-entropy of a row.
    """

    batch_tokens: int | None = (
        None  # upper bound of the tokens in one batch, padding included; null: 1024 on a CPU, 4096 on a GPU
    )

    asks_heldout: ClassVar[bool] = True

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        table = ctx.heldout_tokens
        if table is None or len(table) == 0:
            raise nothing_held_out("classification", ctx)
        gold = np.asarray(table.label)
        if (gold < 0).any():
            row = int(table.record[int(np.argmax(gold < 0))])
            todo = "Give rows with labels, and task=classify."
            raise DataError(f"held-out row {row} has no label", "eval=classification", todo)
        logits = self._logits(bundle, table, ctx)
        answers = logits.argmax(axis=1)
        config: Any = bundle.model.config
        names = config.id2label
        logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        metrics = {
            "accuracy": Metric.mean(answers == gold),
            "macro_f1": Metric(macro_f1(gold, answers), None, len(gold)),
            "loss": Metric.mean(-logs[np.arange(len(gold)), gold], higher_is_better=False),
        }
        predictions = [
            {
                "id": int(table.record[row]),
                "output": names.get(int(answers[row]), int(answers[row])),
                "gold": names.get(int(gold[row]), int(gold[row])),
                "probability": float(np.exp(logs[row, answers[row]])),
                "score": float(answers[row] == gold[row]),
            }
            for row in range(len(gold))
        ]
        return Evaluation(metrics, predictions)

    @torch.no_grad()
    def _logits(self, bundle: Bundle, table: TokenTable, ctx: Context) -> np.ndarray:
        """Logits of every row, (rows, classes), on all processes alike."""
        batches = length_sorted(np.asarray(table.lengths), token_budget(self.batch_tokens, bundle.device))
        mine = ctx.team.share(batches)
        found: dict[int, np.ndarray] = {}
        with ctx.report.task("classify", sum(map(len, mine)), unit="rows") as task:
            for rows in mine:
                batch = collate(table, [[row] for row in rows], bundle.pad_id).to(bundle.device)
                logits = bundle.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
                found |= dict(zip(rows, logits.double().cpu().numpy(), strict=True))
                task.advance(len(rows))
        everywhere: dict[int, np.ndarray] = {}
        for part in ctx.team.collect(found):
            everywhere |= part
        return np.stack([everywhere[row] for row in range(len(table))])
