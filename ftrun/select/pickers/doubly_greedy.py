"""The rows nearest to any query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.geometry.nearest import by_mass, similarity_of

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "doubly_greedy")
@dataclass
class DoublyGreedy(Picker):
    """Rows by max_q S[q, z], their similarity to the nearest query (Nayak et al., 2026, arXiv:2602.14696).

    A query with many near rows can take the whole budget; round_robin gives every query its share.
    """

    needs_similarity: ClassVar[bool] = True

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        candidates = np.sort(candidates)
        highest = similarity_of(table).matrix.max(axis=0)[candidates]
        return budget.take(by_mass(highest, candidates), table.lengths)
