"""How much a prompt helps with its response: what the scorers of the IFD family share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.errors import ConfigError
from ftrun.select.base import PlannedTraining, Scorer, Table
from ftrun.select.scoring.texts import Turns, read_turns
from ftrun.select.trials.inner import InnerTraining, answers_table
from ftrun.select.trials.warmup import warmup_rows
from ftrun.training.scoring import Scoring, segments

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context


@dataclass
class Difficulty(Scorer):
    """Base of scorers by IFD: loss of the response given the prompt over its loss alone, after an optional warm-up."""

    ratio: Literal["loss", "ppl"] = "loss"  # ratio of mean losses, or of their exponentials
    template: Literal["alpaca", "plain", "chat"] = "alpaca"  # layout of the prompt; chat: the tokenizer's own template
    max_length: int = 512  # tokens of prompt and response that are scored
    warmup: int = 0  # rows that the model is trained on before it scores, 1000 in the paper; 0: it scores as it is
    warmup_clusters: int = 100  # clusters of prompts that these rows come from in equal numbers
    warmup_percentiles: list[float] = field(
        default_factory=lambda: [25.0, 75.0]
    )  # of the prompts' perplexity in each cluster
    warmup_epochs: int = 1  # of the training
    warmup_trains: Literal["lora", "full"] = "lora"  # what it changes: adapters, or all weights
    warmup_learning_rate: float = 2e-4  # its peak; for warmup_trains=full rather 2e-5
    warmup_batch_size: int = 16  # rows per step, over all processes

    column: ClassVar[str] = "ifd"
    passes: ClassVar[float] = 2.0  # with and without the prompt: at most

    def __post_init__(self) -> None:
        if not self.max_length > 0:
            raise ConfigError("max_length must be above 0", f"select.max_length={self.max_length}")
        if self.warmup:
            self._check_warmup()

    def _check_warmup(self) -> None:
        for knob in ("warmup", "warmup_clusters", "warmup_epochs", "warmup_learning_rate", "warmup_batch_size"):
            if not getattr(self, knob) > 0:
                raise ConfigError(f"{knob} must be above 0", f"select.{knob}={getattr(self, knob)}")
        bounds = self.warmup_percentiles
        if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 100:
            raise ConfigError(
                "the warm-up takes rows between two percentiles of perplexity",
                f"select.warmup_percentiles={bounds}",
                "Give a lower and an upper one: [25,75].",
            )
        if self.warmup < self.warmup_clusters:
            raise ConfigError(
                f"a warm-up of {self.warmup} rows is less than one for each of {self.warmup_clusters} clusters",
                f"select.warmup={self.warmup}",
                f"Raise it, or set select.warmup_clusters={self.warmup}.",
            )

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Difficulty and its two sides, (rows,) each; NaN where a row has no response that can be scored.

        With ``ratio=ppl`` the two sides are perplexities.
        """
        turns = read_turns(pool, ctx, self.template)
        rooms = [max(0, self.max_length - len(prompt)) for prompt in turns.prompt]
        with self._scoring(turns, pool, ctx) as scoring:
            conditional, direct = self._losses(turns, rooms, scoring)
        direct[np.isnan(conditional)] = np.nan
        self._explain(turns, rooms, conditional, direct, len(pool), ctx)
        if self.ratio == "ppl":
            conditional, direct = np.exp(conditional), np.exp(direct)
        conditional[np.isnan(direct)] = np.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = {"ifd": conditional / direct, "conditional": conditional, "direct": direct}
        return {name: turns.row_mean(values, len(pool)) for name, values in columns.items()}

    def _losses(self, turns: Turns, rooms: list[int], scoring: Scoring) -> tuple[np.ndarray, np.ndarray]:
        """Mean nll of every turn with its prompt and without, (turns,) each."""
        kept = (response[:room] for response, room in zip(turns.response, rooms, strict=True))
        conditional = scoring.mean_nll(segments(zip(turns.prompt, kept, strict=True)), "score responses with prompt")
        direct = scoring.mean_nll(segments(self.direct(turns, rooms)), "score responses alone")
        conditional[np.array(rooms) == 0] = np.nan  # a full prompt leaves nothing to compare
        return conditional, direct

    @contextmanager
    def _scoring(self, turns: Turns, pool: Pool, ctx: Context) -> Iterator[Scoring]:
        """The engine that scores, with the model as it is or after the warm-up."""
        if not self.warmup:
            yield ctx.scorer
            return
        table = answers_table(turns, pool, self.max_length, ctx)
        answered = table.trained_counts() > 0
        candidates = np.unique(turns.row[answered])
        chosen = warmup_rows(turns, pool, candidates, self.warmup, self.warmup_clusters, self.warmup_percentiles, ctx)
        ctx.report.note(f"the model is first trained on {len(chosen)} of {len(pool)} rows")
        training = InnerTraining(
            self.warmup_trains,
            self.warmup_epochs,
            self.warmup_learning_rate,
            self.warmup_batch_size,
            called="select.warmup_",
        )
        with training.trained(table.rows(np.flatnonzero(answered & np.isin(turns.row, chosen))), ctx) as epoch:
            yield epoch.scoring(ctx)

    def direct(self, turns: Turns, rooms: list[int]) -> Iterable[tuple[list[int], list[int]]]:
        """Context and targets of the pass without the prompt; ``rooms`` are the response tokens that the prompt leaves."""
        return ((turns.answer_mark, response[:room]) for response, room in zip(turns.response, rooms, strict=True))

    def planned_trainings(self, rows: int) -> list[PlannedTraining]:
        if not self.warmup:
            return []
        full = self.warmup_trains == "full"
        return [PlannedTraining(min(self.warmup, rows), self.warmup_epochs, self.warmup_batch_size, full)]

    def keep(self, table: Table) -> np.ndarray:
        """Exactly 1, a prompt that changes nothing, stays."""
        return table.columns["ifd"] <= 1

    def _explain(
        self, turns: Turns, rooms: list[int], conditional: np.ndarray, direct: np.ndarray, rows: int, ctx: Context
    ) -> None:
        """Say why rows stay without a score, and how many were scored in part."""
        reasons = dict.fromkeys(range(rows), "no response")
        cut = 0
        for index, row in enumerate(turns.row.tolist()):
            cut += 0 < rooms[index] < len(turns.response[index])
            if not np.isnan(direct[index]):
                reasons[row] = ""
            elif reasons[row] == "no response":
                full = rooms[index] == 0
                reasons[row] = (
                    f"the prompt fills max_length={self.max_length}"
                    if full
                    else "a one-token response has no direct loss"
                )
        ctx.scorer.reasons |= {row: reason for row, reason in reasons.items() if reason}
        if cut:
            ctx.report.note(f"{cut} of {len(rooms)} responses are scored up to max_length={self.max_length} only")


@dataclass
class PromptedPerplexity(Difficulty):
    """Base of scorers by IFD as a ratio of perplexities: only rows below 1 are kept."""

    ratio: Literal["loss", "ppl"] = "ppl"  # ratio of mean losses, or of their exponentials
    truncation: Literal["equal", "reference"] = (
        "equal"  # reference: a direct side that is cut keeps one token more, as in the authors' code
    )

    def direct(self, turns: Turns, rooms: list[int]) -> Iterable[tuple[list[int], list[int]]]:
        # the authors' extra token is meant for a BOS; without one it is a response token that the other side never sees
        extra = 1 if self.truncation == "reference" and not turns.answer_mark else 0
        return super().direct(turns, [room + extra for room in rooms])

    def keep(self, table: Table) -> np.ndarray:
        return table.columns["ifd"] < 1
