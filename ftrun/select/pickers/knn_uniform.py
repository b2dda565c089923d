"""Equal mass on the nearest rows of every query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.geometry.nearest import by_mass, nearest_rows, similarity_of

if TYPE_CHECKING:
    from ftrun.runs.context import Context


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


def check_bounds(alpha: float, c: float, neighbours: int) -> None:
    """Raise ConfigError for a knob out of its range."""
    if not 0 < alpha < 1:
        raise ConfigError("alpha lies between 0 and 1", f"select.picker.alpha={alpha}")
    if not c > 0:
        raise ConfigError("c is above 0", f"select.picker.c={c}")
    if neighbours < 2:
        raise ConfigError("a query has at least 2 neighbours", f"select.picker.neighbours={neighbours}")


def warn_of_massless(mass: np.ndarray, table: Table, candidates: np.ndarray, budget: Budget, ctx: Context) -> None:
    """Say when the budget reaches rows that no query gave any mass: they come in the order of the pool."""
    picked = len(budget.take(by_mass(mass, candidates), table.lengths))
    carriers = int((mass > 0).sum())
    if picked > carriers:
        ctx.report.warn(
            f"only {carriers:,} rows have any mass, and {picked:,} are picked: the others come in the order of the pool. "
            "Lower select.picker.alpha, raise select.picker.neighbours, or lower the budget"
        )
