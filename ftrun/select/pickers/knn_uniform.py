"""Equal mass on the nearest rows of every query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.geometry.nearest import by_mass, check_bounds, nearest_rows, similarity_of, warn_of_massless

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "knn_uniform")
@dataclass
class KnnUniform(Picker):
    """Rows by how many queries have them among their k nearest (Nayak et al., 2026, arXiv:2602.14696; Liu et al., 2024).

    d = 1 - S, the neighbours of a query q sorted by it. k is the smallest number with
    ``(alpha / C) sum_q sum_(j <= k) (d[q, k+1] - d[q, j]) >= (1 - alpha) M`` for M queries, at most L; each query
    spreads 1 / M evenly over its k nearest rows, and rows are ranked by their mass.
    """

    alpha: float = 0.01  # weight of staying near the queries against spreading out; higher: fewer neighbours
    c: float = 5.0  # C, which makes distances and spread comparable
    neighbours: int = 5000  # L, the most neighbours of a query

    needs_similarity: ClassVar[bool] = True

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        check_bounds(self.alpha, self.c, self.neighbours)
        candidates = np.sort(candidates)
        count = min(self.neighbours, len(candidates))
        positions, values = nearest_rows(similarity_of(table), candidates, count)
        k = self.stop(1 - values)
        if k == count:
            ctx.report.warn(
                f"knn_uniform never meets its stop rule: all {k:,} neighbours of each query get equal mass, which says "
                f"little on so small a pool. Raise select.picker.alpha (now {self.alpha})"
            )
        mass = np.bincount(positions[:, :k].reshape(-1), minlength=len(candidates)) / (k * len(positions))
        warn_of_massless(mass, table, candidates, budget, ctx)
        return budget.take(by_mass(mass, candidates), table.lengths)

    def stop(self, distances: np.ndarray) -> int:
        """k for the sorted distances (queries, L)."""
        queries, most = distances.shape
        ks = np.arange(1, most)
        gaps = (ks * distances[:, 1:] - np.cumsum(distances, axis=1)[:, :-1]).sum(axis=0)
        enough = np.flatnonzero(self.alpha / self.c * gaps >= (1 - self.alpha) * queries)
        return int(ks[enough[0]]) if len(enough) else most
