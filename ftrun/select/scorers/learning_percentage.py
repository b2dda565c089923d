"""How early in a training a row is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import PlannedTraining, Scorer
from ftrun.select.scoring.texts import read_turns
from ftrun.select.trials.inner import InnerTraining, answers_table, trainable

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context

NAMED = 20  # rows that a message names


@register("select", "learning_percentage")
@dataclass
class LearningPercentage(Scorer):
    """What a small model learns late is hard, and worth training on (Mekala et al., 2024, arXiv:2402.10430).

    The scoring model is fine-tuned on the whole pool. With P_e the perplexity of a row's response after epoch e,
    LP = (P_0 - P_1) / (P_0 - P_last) is the share of all learning that the first epoch brings; the approximate form
    (P_0 - P_1) / P_0 needs that epoch only. ``late`` = 1 - LP: the highest are taken. Where P_last >= P_0 the row was
    not learned at all and LP means nothing: see ``guard``. A row with several answers gets the mean of their
    perplexities, each given all turns before it.
    """

    form: Literal["exact", "approximate"] = "exact"  # approximate: one epoch, and the share of P_0 that it takes away
    guard: Literal["clip", "drop"] = (
        "drop"  # rows that were not learned: LP 0 and all others within 0 and 1, or no score
    )
    epochs: int = 3  # of the fine-tuning, in the exact form
    template: Literal["alpaca", "plain", "chat"] = "alpaca"  # layout of the prompt; chat: the tokenizer's own template
    max_length: int = 512  # tokens of prompt and response
    trains: Literal["lora", "full"] = "lora"  # what the fine-tuning changes: adapters, or all weights
    learning_rate: float = 2e-4  # peak of the fine-tuning; for trains=full rather 2e-5
    batch_size: int = 32  # rows per step of the fine-tuning, over all processes
    r: int = 16  # rank of the adapters

    column: ClassVar[str] = "late"
    own_picker: ClassVar[str] = "first_chunk"

    def __post_init__(self) -> None:
        for name in ("epochs", "max_length", "learning_rate", "batch_size", "r"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"select.{name} must be above 0", f"select.{name}={getattr(self, name)}")
        if self.form == "exact" and self.epochs < 2:
            raise ConfigError(
                "after one epoch of one there is nothing left to learn: LP would be 1 everywhere",
                f"select.epochs={self.epochs}",
                "Use two epochs or more, or select.form=approximate.",
            )

    @property
    def trained_epochs(self) -> int:
        return self.epochs if self.form == "exact" else 1

    @property
    def passes(self) -> float:  # type: ignore[override]
        return 1.0 + self.trained_epochs  # before the training, and after every epoch

    def planned_trainings(self, rows: int) -> list[PlannedTraining]:
        return [PlannedTraining(rows, self.trained_epochs, self.batch_size, self.trains == "full")]

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """``late``, ``learning_percentage`` and the perplexities ``ppl_0`` ... of every epoch, (rows,) each."""
        turns = read_turns(pool, ctx, self.template)
        table = answers_table(turns, pool, self.max_length, ctx)
        training = InnerTraining(
            self.trains,
            self.trained_epochs,
            self.learning_rate,
            self.batch_size,
            lora={"r": self.r, "lora_alpha": 2.0 * self.r},
        )
        losses = [ctx.scorer.mean_nll(table, "score before training")]
        for epoch in training.run(trainable(table), ctx):
            losses.append(epoch.scoring(ctx).mean_nll(table, f"score after epoch {epoch.number}"))
        trace = [turns.row_mean(np.exp(nll), len(pool)) for nll in losses]
        percentage = self.percentage(trace, pool, ctx)
        columns = {"late": 1 - percentage, "learning_percentage": percentage}
        return columns | {f"ppl_{number}": perplexity for number, perplexity in enumerate(trace)}

    def percentage(self, trace: list[np.ndarray], pool: Pool, ctx: Context) -> np.ndarray:
        """LP from the perplexities before training and after each epoch, (rows,); ``guard`` applied, its rows named."""
        before, first, last = trace[0], trace[1], trace[-1]
        if self.form == "approximate":
            return (before - first) / before
        learned = before - last
        unlearned = learned <= 0
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (before - first) / learned
        if self.guard == "clip":
            result = np.where(unlearned, 0.0, np.clip(share, 0, 1))
        else:
            result = np.where(unlearned, np.nan, share)
            ctx.scorer.reasons |= dict.fromkeys(np.flatnonzero(unlearned).tolist(), "no easier after the fine-tuning")
        self._name(np.flatnonzero(unlearned), pool, ctx)
        return np.where(np.isnan(last), np.nan, result)

    def _name(self, places: np.ndarray, pool: Pool, ctx: Context) -> None:
        if not len(places):
            return
        ids = ", ".join(map(str, pool.ids[places[:NAMED]].tolist())) + (" ..." if len(places) > NAMED else "")
        outcome = "count as LP 0" if self.guard == "clip" else "have no LP"
        ctx.report.note(f"{len(places)} of {len(pool)} rows were not learned and {outcome} (guard={self.guard}): {ids}")
