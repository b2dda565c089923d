"""Equal shares of every language, source or other kind of row."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftrun.errors import DataError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table, ranked

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context


@register("picker", "stratified")
@dataclass
class Stratified(Picker):
    """The best rows of every kind, as many of one as of another (Chen et al., 2024, arXiv:2309.08958).

    Rows of a kind share the value of ``field``, or without one the source that they were read from. A budget in rows
    gives every kind the same number of rows, one in tokens the same number of tokens, up to one row; what a small kind
    cannot give goes to the others. Within a kind the highest scores come first.
    """

    field: str | None = None  # column that tells kinds apart (language, source); null: one kind a source of data.path

    needs_scores: ClassVar[bool] = True

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        pool = table.pool
        assert pool is not None
        order = ranked(table, candidates, column)
        names, kind = self.kinds(pool)
        cost = np.ones(len(order)) if budget.tokens is None else table.lengths[order]
        picked = budget.take(order[evenly(kind[order], cost)], table.lengths)
        counts = np.bincount(kind[picked], minlength=len(names))
        shares = ", ".join(f"{name} {count:,}" for name, count in zip(names[:20], counts[:20].tolist(), strict=True))
        ctx.report.note(f"{len(names)} kinds of rows: {shares}{' ...' if len(names) > 20 else ''}")
        return picked

    def kinds(self, pool: Pool) -> tuple[list[str], np.ndarray]:
        """Names of the kinds, sorted, and the number of each row's kind, (rows,). Raises DataError for rows of no kind."""
        if self.field is None:
            numbers, kind = np.unique(pool.index["source"][pool.ids], return_inverse=True)
            return [f"source {number}" for number in numbers.tolist()], kind
        values = [self._value(pool, int(number)) for number in pool.ids]
        names = sorted(set(values))
        numbered = {name: number for number, name in enumerate(names)}
        return names, np.array([numbered[value] for value in values], np.int64)

    def _value(self, pool: Pool, number: int) -> str:
        value: Any = pool.fields(number).get(str(self.field))
        if value is None or isinstance(value, (list, dict)):
            what = f"row {number} has no {self.field}" if value is None else f"{self.field} of row {number} is no name"
            todo = "Name a column that every row has: select.picker.field=... Without one, every source is a kind."
            raise DataError(what, pool.origin(number), todo)
        return str(value)


def evenly(kind: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Positions dealt so that what each kind has cost so far stays as equal as can be, within a kind as they come, (rows,).

    Kinds that are level take turns in the order of their first member.
    """
    members = [np.flatnonzero(kind == number).tolist() for number in np.unique(kind)]
    waiting = [(0.0, rows[0], rows, 0) for rows in members]
    heapq.heapify(waiting)
    dealt = []
    while waiting:
        spent, first, rows, at = heapq.heappop(waiting)
        dealt.append(rows[at])
        if at + 1 < len(rows):
            heapq.heappush(waiting, (spent + float(cost[rows[at]]), first, rows, at + 1))
    return np.array(dealt, np.int64)
