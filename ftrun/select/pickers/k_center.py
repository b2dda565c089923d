"""Rows that leave no other row far away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.geometry.cluster import by_content, embeddings_of, picker_name
from ftrun.select.geometry.greedy import EXACT_ROWS, Goal, block_by_block, seconds_for, spoken

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "k_center")
@dataclass
class KCenter(Picker):
    """Greedy k-center (Gonzalez, 1985; a baseline of Xia et al., 2024, arXiv:2410.09335).

    Starts with the row nearest to the mean; then each pick is the row farthest from all picked so far, its distance
    being that to the nearest of them. The largest distance left is at most twice the smallest possible. Exact takes
    rows x picks distances; in blocks, random blocks of rows give their shares and that bound holds in each block only.
    """

    method: Literal["auto", "exact", "blocks"] = "auto"  # auto: exact up to 12,000 rows
    block: int = 4096  # rows of a block
    embedding: Literal["minilm", "model"] = "model"  # the mean hidden state of the scoring model, or all-MiniLM-L6-v2
    of: Literal["prompt", "row"] = "row"  # text that is embedded

    needs_scores: ClassVar[bool] = False

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        if self.block < 2:
            raise ConfigError("a block holds at least 2 rows", f"select.picker.block={self.block}")
        vectors = embeddings_of(table, ctx, self.embedding, self.of)
        rows = by_content(table, candidates, ctx, "k_center")
        goal = Goal.of(budget, rows, table.lengths)
        if self._exactly(vectors, rows, goal, ctx):
            order = farthest_first(np.asarray(vectors[rows], np.float32), goal)
        else:

            def pick_block(part: np.ndarray, number: int, share: Goal) -> np.ndarray:
                return farthest_first(np.asarray(vectors[rows[part]], np.float32), share)

            order = block_by_block(len(rows), self.block, goal, pick_block, ctx)
        return budget.take(rows[order], table.lengths)

    def _exactly(self, vectors: np.ndarray, rows: np.ndarray, goal: Goal, ctx: Context) -> bool:
        """Whether every pick looks at all rows; what that costs is said before it starts."""
        if len(rows) <= EXACT_ROWS:
            return self.method != "blocks"
        some = np.asarray(vectors[rows[:EXACT_ROWS]], np.float32)

        def compare(count: int) -> None:
            for row in range(count):
                np.matmul(some[:count], some[row])

        seconds = spoken(seconds_for(len(rows) * goal.picks, compare, len(some)))
        if self.method == "exact":
            ctx.report.warn(
                f"{picker_name(ctx)} takes {len(rows):,} rows x {goal.picks:,} picks distances, about {seconds}; "
                "select.picker.method=blocks is linear in the rows"
            )
        elif self.method == "auto":
            ctx.report.note(
                f"{picker_name(ctx)} looks at blocks of {self.block:,} rows (method=blocks): all {len(rows):,} at "
                f"every pick would take about {seconds} (select.picker.method=exact)"
            )
        return self.method == "exact"


def farthest_first(vectors: np.ndarray, goal: Goal) -> np.ndarray:
    """Positions in the order of farthest-first traversal, (picked,); ties go to the lower position."""
    squares = np.einsum("ij,ij->i", vectors, vectors)

    def squared_from(point: np.ndarray) -> np.ndarray:
        return np.maximum(squares - 2 * (vectors @ point) + point @ point, 0)

    last = int(squared_from(vectors.mean(0, dtype=np.float64).astype(vectors.dtype)).argmin())
    apart = np.full(len(vectors), np.inf, vectors.dtype)
    picked: list[int] = []
    spent = 0.0
    while True:
        picked.append(last)
        spent += float(goal.cost[last])
        if spent >= goal.amount or len(picked) == len(vectors):
            return np.array(picked, np.int64)
        np.minimum(apart, squared_from(vectors[last]), out=apart)
        apart[last] = -1  # picked rows are never farthest, not even among copies
        last = int(apart.argmax())
