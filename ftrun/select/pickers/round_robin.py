"""Queries that take rows in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.geometry.nearest import best_places, similarity_of
from ftrun.training.scoring import Similarity

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "round_robin")
@dataclass
class RoundRobin(Picker):
    """Every query takes its most similar row in turn, until the budget is met (Ivison et al., 2025, arXiv:2503.01807).

    With several tasks (files of queries) the tasks take turns instead, and what a task ranks by is a row's highest
    similarity over its queries. Picks for a budget are the beginning of the picks for any larger one.
    """

    on_duplicate: Literal["next_best", "skip_turn"] = (
        "next_best"  # a row is taken already: take the next, or lose the turn
    )
    turns: Literal["auto", "queries", "tasks"] = "auto"  # who takes turns; auto: queries of one task, else tasks

    needs_similarity: ClassVar[bool] = True

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        candidates = np.sort(candidates)
        takers = _Takers(self.rankings(similarity_of(table)), candidates)
        wanted = len(candidates) if budget.rows is None else min(budget.rows, len(candidates))
        left = np.inf if budget.tokens is None else budget.tokens
        order = []
        for position in takers.take(self.on_duplicate == "skip_turn"):
            if len(order) == wanted or left < 0:
                break
            order.append(candidates[position])
            left -= table.lengths[candidates[position]]
        return budget.take(np.array(order, np.int64), table.lengths)

    def rankings(self, similarity: Similarity) -> np.ndarray:
        """What each taker ranks the rows by, (takers, rows)."""
        tasks = np.unique(similarity.task)
        if self.turns == "queries" or (self.turns == "auto" and len(tasks) == 1):
            return similarity.matrix
        return np.stack([similarity.matrix[similarity.task == task].max(axis=0) for task in tasks])


class _Takers:
    """Each taker's candidates from the best on, sorted no further than they are asked for."""

    def __init__(self, rankings: np.ndarray, candidates: np.ndarray):
        self.rankings, self.candidates = rankings, candidates
        self.best = [np.zeros(0, np.int64)] * len(rankings)
        self.next = [0] * len(rankings)

    def take(self, skip: bool) -> Iterator[int]:
        """Positions of the candidates in the order in which they are taken, each once."""
        taken = np.zeros(len(self.candidates), bool)
        while not taken.all():
            for taker in range(len(self.rankings)):
                position = self._pop(taker)
                while position is not None and taken[position] and not skip:
                    position = self._pop(taker)
                if position is not None and not taken[position]:
                    taken[position] = True
                    yield position

    def _pop(self, taker: int) -> int | None:
        """The best candidate that this taker has not looked at yet; None when it has seen all."""
        if self.next[taker] == len(self.candidates):
            return None
        if self.next[taker] == len(self.best[taker]):
            depth = min(len(self.candidates), max(32, 2 * len(self.best[taker])))
            self.best[taker] = best_places(self.rankings[taker][self.candidates], depth)
        position = int(self.best[taker][self.next[taker]])
        self.next[taker] += 1
        return position
