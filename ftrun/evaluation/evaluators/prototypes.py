"""Classification by the nearest class prototype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from ftrun.data.batches import collate, length_sorted, token_budget
from ftrun.data.tokens import TokenTable
from ftrun.errors import ConfigError
from ftrun.evaluation.averages import macro_f1
from ftrun.evaluation.base import Evaluation, Evaluator, Metric, nothing_held_out
from ftrun.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from ftrun.data.batches import Batch
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

FILE = "prototypes.safetensors"


@runtime_checkable
class ReadsMasks(Protocol):
    """An objective that puts masks into a row and classifies by the states there."""

    def states(self, bundle: Bundle, batch: Batch) -> Tensor: ...


@register("eval", "prototypes")
@dataclass
class Prototypes(Evaluator):
    """How often the nearest prototype has a held-out row's label (Karimi Mahabadi et al., 2022, arXiv:2204.01172).

    The prototype of a class at a mask is the mean state there of the training rows of that class. A row's similarity to
    a class is the largest over the masks of ``exp(-|u - v|^2)`` between its state and the prototype, both of length 1.
    Label embeddings play no part. eval/prototypes.safetensors keeps the prototypes, (classes, masks, width). Only for
    objective=perfect.
    """

    batch_tokens: int | None = (
        None  # upper bound of the tokens in one batch, padding included; null: 1024 on a CPU, 4096 on a GPU
    )

    asks_heldout: ClassVar[bool] = True

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        objective = ctx.settings.component("objective")
        if not isinstance(objective, ReadsMasks):
            raise ConfigError(
                "eval=prototypes reads the states at the masks that objective=perfect puts into a row",
                f"objective={ctx.settings.choice('objective')}",
                "Use eval=classification.",
            )
        table = ctx.heldout_tokens
        if table is None or len(table) == 0:
            raise nothing_held_out("prototypes", ctx)
        config: Any = bundle.model.config
        prototypes = self._prototypes(objective, bundle, ctx, config.num_labels)
        similarity = similarities(self._states(objective, bundle, table, ctx), prototypes)
        answers, gold = similarity.argmax(axis=1), np.asarray(table.label)
        metrics = {
            "accuracy": Metric.mean(answers == gold),
            "macro_f1": Metric(macro_f1(gold, answers), None, len(gold)),
        }
        names = config.id2label
        predictions = [
            {
                "id": int(table.record[row]),
                "output": names.get(int(answers[row]), int(answers[row])),
                "gold": names.get(int(gold[row]), int(gold[row])),
                "similarity": float(similarity[row, answers[row]]),
                "score": float(answers[row] == gold[row]),
            }
            for row in range(len(gold))
        ]
        return Evaluation(metrics, predictions)

    def _prototypes(self, objective: ReadsMasks, bundle: Bundle, ctx: Context, classes: int) -> np.ndarray:
        """(classes, masks, width) from the training rows, or those that the run has kept."""
        file = ctx.out / "eval" / FILE
        if ctx.train_tokens is None:
            if not file.is_file():
                raise ConfigError(
                    "eval=prototypes needs training rows, or the prototypes that a run has kept",
                    str(file),
                    "Evaluate a finished run of objective=perfect.",
                )
            return load_file(file)["prototypes"]
        found = class_means(
            self._states(objective, bundle, ctx.train_tokens, ctx), np.asarray(ctx.train_tokens.label), classes
        )
        if ctx.team.rank == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"prototypes": found}, file)
        return found

    @torch.no_grad()
    def _states(self, objective: ReadsMasks, bundle: Bundle, table: TokenTable, ctx: Context) -> np.ndarray:
        """States at the masks of every row, (rows, masks, width), on all processes alike."""
        batches = length_sorted(np.asarray(table.lengths), token_budget(self.batch_tokens, bundle.device))
        mine = ctx.team.share(batches)
        found: dict[int, np.ndarray] = {}
        with ctx.report.task("classify", sum(map(len, mine)), unit="rows") as task:
            for rows in mine:
                batch = collate(table, [[row] for row in rows], bundle.pad_id).to(bundle.device)
                states = objective.states(bundle, batch).double().cpu().numpy()
                found |= dict(zip(rows, states, strict=True))
                task.advance(len(rows))
        everywhere: dict[int, np.ndarray] = {}
        for part in ctx.team.collect(found):
            everywhere |= part
        return np.stack([everywhere[row] for row in range(len(table))])


def class_means(states: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Mean states by class, (classes, masks, width), NaN for a class without rows."""
    found = np.full((classes, *states.shape[1:]), np.nan)
    for label in range(classes):
        if (labels == label).any():
            found[label] = states[labels == label].mean(axis=0)
    return found


def similarities(states: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """Similarity of every row to every class, (rows, classes): the largest over the masks; 0 without a prototype."""
    u, v = _unit(states)[:, None], _unit(prototypes)[None]
    each = np.exp(-np.square(u - v).sum(axis=-1))  # (rows, classes, masks)
    return np.nan_to_num(each, nan=0.0).max(axis=-1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
