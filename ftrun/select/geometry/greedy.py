"""Greedy picking in blocks of rows, for methods whose exact form compares every row with every other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ftrun.select.base import Budget

if TYPE_CHECKING:
    from ftrun.training.context import Context

EXACT_ROWS = 12_000  # rows that are compared all with all without being asked for; 576 MB of similarities
SAMPLED = 1024  # rows that an estimate of time compares


@dataclass
class Goal:
    """Picking ends once the picked rows cost ``amount``. ``cost``: (rows,), 1 each, or their tokens."""

    cost: np.ndarray
    amount: float

    @classmethod
    def of(cls, budget: Budget, rows: np.ndarray, lengths: np.ndarray) -> Goal:
        if budget.rows is not None:
            return cls(np.ones(len(rows)), budget.rows)
        assert budget.tokens is not None
        return cls(lengths[rows].astype(np.float64), budget.tokens + 1)  # the row that does not fit ends it

    def part(self, some: np.ndarray) -> Goal:
        """The share of the goal that falls to these rows."""
        return Goal(self.cost[some], float(np.ceil(self.amount * len(some) / len(self.cost))))

    @property
    def picks(self) -> int:
        """About how many rows reach it."""
        mean = max(float(self.cost.mean()), 1e-12)
        return int(min(len(self.cost), max(1, np.ceil(self.amount / mean))))


# picks out of a block: positions of its rows, number of the block, its goal -> positions within the block, best first
PickBlock = Callable[[np.ndarray, int, Goal], np.ndarray]


def block_by_block(rows: int, block: int, goal: Goal, pick: PickBlock, ctx: Context) -> np.ndarray:
    """Positions picked from blocks of at most ``block`` rows, each giving its share, one from each block in turn."""
    parts = np.array_split(np.arange(rows), max(1, -(-rows // block)))
    picked, turn = [], []
    with ctx.report.task("pick", rows, unit="rows") as task:
        for number, part in enumerate(parts):
            chosen = part[pick(part, number, goal.part(part))]
            picked.append(chosen)
            turn.append(np.arange(len(chosen)))
            task.advance(len(part))
    return np.concatenate(picked)[np.argsort(np.concatenate(turn), kind="stable")]


def seconds_for(pairs: float, compare: Callable[[int], object], rows: int) -> float:
    """About how long ``pairs`` comparisons take, measured by ``compare(n)``, which compares n rows with n."""
    sampled = min(SAMPLED, rows)
    compare(sampled)  # the first call is slower
    started = time.perf_counter()
    compare(sampled)
    return (time.perf_counter() - started) * pairs / sampled**2


def spoken(seconds: float) -> str:
    """A duration for people."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"
