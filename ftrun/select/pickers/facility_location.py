"""Rows that stand for all the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table, ranked
from ftrun.select.geometry.cluster import by_content, embeddings_of, picker_name
from ftrun.select.geometry.greedy import EXACT_ROWS, Goal, block_by_block, seconds_for, spoken

if TYPE_CHECKING:
    from ftrun.training.context import Context

RENEWED = 32  # stale gains that are computed anew at a time
BLOCK = 1024  # rows whose similarities are computed at a time


@register("picker", "facility_location")
@dataclass
class FacilityLocation(Picker):
    """Greedy facility location (as in Superfiltering.D: Li et al., 2024, arXiv:2402.00530).

    Maximises f(A) = sum_i max_{j in A} s(i, j), s(i, j) = exp(-|x_i - x_j| / width of the embedding), over the best
    rows by score. Exact: lazy greedy (Minoux, 1978), quadratic in the rows. Stochastic: in random blocks of rows, each
    step looks at a random (block / picks) ln(1 / epsilon) of them (Mirzasoleiman et al., 2015); linear in the rows.
    """

    top_share: float = 1.0  # share of the pool, the highest scores, that may be picked and counts
    method: Literal["auto", "exact", "stochastic"] = "auto"  # auto: exact up to 12,000 rows
    epsilon: float = 0.1  # of the stochastic form: expected loss against exact greedy inside a block
    block: int = 4096  # of the stochastic form: rows that are compared with each other
    embedding: Literal["minilm", "model"] = "minilm"  # all-MiniLM-L6-v2, or the mean hidden state of the scoring model
    of: Literal["prompt", "row"] = "row"  # text that is embedded

    needs_scores: ClassVar[bool] = False

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        self._check(column)
        vectors = embeddings_of(table, ctx, self.embedding, self.of)
        rows = by_content(table, self._best(table, candidates, column, budget, ctx), ctx, "facility_location")
        goal = Goal.of(budget, rows, table.lengths)
        if self._exactly(vectors, rows, ctx):
            order = lazy_greedy(Near(vectors[rows], keep=len(rows) <= EXACT_ROWS), goal)
        else:

            def pick_block(part: np.ndarray, number: int, share: Goal) -> np.ndarray:
                near = Near(np.asarray(vectors[rows[part]], np.float32), keep=True)
                return stochastic_greedy(near, share, self.epsilon, np.random.default_rng([ctx.seed, number]))

            order = block_by_block(len(rows), self.block, goal, pick_block, ctx)
        return budget.take(rows[order], table.lengths)

    def _check(self, column: str) -> None:
        if not 0 < self.top_share <= 1:
            raise ConfigError("top_share is a share of the pool", f"select.picker.top_share={self.top_share}")
        if self.top_share < 1 and not column:
            raise ConfigError(
                "top_share needs a score to rank by",
                f"select.picker.top_share={self.top_share} select=none",
                "Choose a scorer, select=superfiltering for one, or select.picker.top_share=1.",
            )
        if not 0 < self.epsilon < 1 or self.block < 2:
            raise ConfigError(
                "epsilon lies between 0 and 1, and a block holds at least 2 rows",
                f"select.picker.epsilon={self.epsilon} select.picker.block={self.block}",
            )

    def _best(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        if self.top_share == 1:
            return candidates
        count = max(1, int(self.top_share * len(table) + 1e-9))
        if budget.rows is not None and min(budget.rows, len(candidates)) > count:
            ctx.report.warn(
                f"the budget of {budget.rows} rows is more than the {count} that top_share={self.top_share} lets in: "
                "all of them are picked"
            )
        return ranked(table, candidates, column)[:count]

    def _exactly(self, vectors: np.ndarray, rows: np.ndarray, ctx: Context) -> bool:
        """Whether to compare all with all; what it costs is said before it starts."""
        if len(rows) <= EXACT_ROWS:
            return self.method != "stochastic"
        some = np.asarray(vectors[rows[:BLOCK]], np.float32)
        seconds = spoken(seconds_for(len(rows) ** 2, lambda n: Near(some[:n], keep=True), len(some)))
        if self.method == "exact":
            ctx.report.warn(
                f"{picker_name(ctx)} compares {len(rows):,} rows all with all, which takes at least {seconds}; "
                "select.picker.method=stochastic is linear in the rows"
            )
        elif self.method == "auto":
            ctx.report.note(
                f"{picker_name(ctx)} compares rows in blocks of {self.block:,} (method=stochastic): all {len(rows):,} "
                f"with all would take at least {seconds} (select.picker.method=exact)"
            )
        return self.method == "exact"


class Near:
    """s(i, j) - 1 between rows; the constant changes no gain but the first, and leaves float32 its digits."""

    def __init__(self, vectors: np.ndarray, keep: bool):
        self.vectors, self.squares = vectors, np.einsum("ij,ij->i", vectors, vectors)
        self.matrix = None
        if keep:
            self.matrix = np.empty((len(vectors), len(vectors)), np.float32)
            for at in range(0, len(vectors), BLOCK):
                self.matrix[at : at + BLOCK] = self._computed(np.arange(at, min(at + BLOCK, len(vectors))))

    def __len__(self) -> int:
        return len(self.vectors)

    def to_all(self, some: np.ndarray) -> np.ndarray:
        """Between these rows and all, (some, rows) float32."""
        return self._computed(some) if self.matrix is None else self.matrix[some]

    def _computed(self, some: np.ndarray) -> np.ndarray:
        # dtype of the vectors: distances of near duplicates lose half of its digits
        apart = self.vectors[some] @ self.vectors.T
        apart *= -2
        apart += self.squares
        apart += self.squares[some, None]
        np.maximum(apart, 0, out=apart)
        apart[np.arange(len(some)), some] = 0
        np.sqrt(apart, out=apart)
        apart /= -self.vectors.shape[1]
        return np.expm1(apart, out=apart).astype(np.float32, copy=False)


def lazy_greedy(near: Near, goal: Goal) -> np.ndarray:
    """Positions in the order of greedy facility location; ties go to the lower position.

    Gains only fall as rows are picked, so an old gain is an upper bound: only the few highest are computed anew.
    """
    rows = len(near)
    gain = np.concatenate([_sums(near, np.arange(at, min(at + BLOCK, rows)), None) for at in range(0, rows, BLOCK)])
    fresh = np.ones(rows, bool)
    best: np.ndarray | None = None
    picked: list[int] = []
    spent = 0.0
    while spent < goal.amount and len(picked) < rows:
        highest = int(gain.argmax())
        while not fresh[highest]:
            some = highest + np.zeros(1, np.int64)
            if rows > RENEWED:
                some = np.union1d(some, np.argpartition(-gain, RENEWED)[:RENEWED])
            some = some[~fresh[some] & np.isfinite(gain[some])]
            gain[some], fresh[some] = _sums(near, some, best), True
            highest = int(gain.argmax())
        picked.append(highest)
        spent += float(goal.cost[highest])
        own = near.to_all(np.array([highest]))[0]
        if best is None:
            gain += rows  # the constant that s - 1 leaves out of the first gain: with it they bound what comes
        best = own if best is None else np.maximum(best, own)
        gain[highest] = -np.inf
        fresh[:] = False
    return np.array(picked, np.int64)


def _sums(near: Near, some: np.ndarray, best: np.ndarray | None) -> np.ndarray:
    """What f gains by each of these rows, (some,) float64; ``best``: (rows,) similarity to the nearest picked row."""
    own = near.to_all(some)
    return (own if best is None else np.maximum(own - best, 0)).sum(1, dtype=np.float64)


def stochastic_greedy(near: Near, goal: Goal, epsilon: float, random: np.random.Generator) -> np.ndarray:
    """Positions in the order of stochastic greedy facility location."""
    assert near.matrix is not None
    rows = len(near)
    looked_at = int(np.ceil(rows / goal.picks * np.log(1 / epsilon)))
    left = random.permutation(rows)
    best: np.ndarray | None = None
    picked: list[int] = []
    spent = 0.0
    while spent < goal.amount and len(left):
        places = random.choice(len(left), min(looked_at, len(left)), replace=False)
        chosen = int(places[_sums(near, left[places], best).argmax()])
        row = int(left[chosen])
        picked.append(row)
        spent += float(goal.cost[row])
        best = near.matrix[row] if best is None else np.maximum(best, near.matrix[row])
        left[chosen] = left[-1]
        left = left[:-1]
    return np.array(picked, np.int64)
