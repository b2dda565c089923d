"""Mass on the nearest rows of every query, less where rows crowd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.geometry.nearest import by_mass, check_bounds, nearest_rows, similarity_of, warn_of_massless

if TYPE_CHECKING:
    from ftrun.training.context import Context

AT_ONCE = 256  # rows compared with all others in one product
SLOW_FROM = 50_000  # rows from which comparing all with all is worth a word


@register("picker", "knn_kde")
@dataclass
class KnnKde(Picker):
    """Nearest rows of every query, near-duplicates sharing one row's mass (Liu et al., 2024, "TSDS", arXiv:2410.11303).

    A neighbour z counts 1 / kde(z), with kde(z) the sum of ``max(0, 1 - 2 d / sigma^2)`` over its own nearest rows,
    itself included. A level s grows; a query's neighbours, nearest first, each hold 1 / (s kde) of its mass 1 / M, until
    ``(alpha / C) sum_q sum_j (d[q, next] - d[q, j]) / kde[j] >= (1 - alpha) M``. Rows are ranked by their mass.
    """

    alpha: float = 0.01  # weight of staying near the queries against spreading out; higher: fewer neighbours
    c: float = 5.0  # C, which makes distances and spread comparable
    sigma: float = 0.75  # how near rows must be to count as alike; 0: all count one
    neighbours: int = 5000  # the most neighbours of a query; at most a tenth of the pool
    kde_neighbours: int = 1000  # the most rows that a density looks at; at most a tenth of the pool

    needs_similarity: ClassVar[bool] = True

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        check_bounds(self.alpha, self.c, self.neighbours)
        if self.kde_neighbours < 1:
            raise ConfigError(
                "a density looks at one row at least", f"select.picker.kde_neighbours={self.kde_neighbours}"
            )
        similarity = similarity_of(table)
        if table.embeddings is None:
            raise ConfigError(
                "picker=knn_kde compares rows with each other, and the scorer keeps no vectors of them",
                todo="Use select=rds_plus or embedding_similarity, or another picker.",
            )
        candidates = np.sort(candidates)
        tenth = max(1, len(candidates) // 10)
        count = min(len(candidates), max(2, min(self.neighbours, tenth)))
        positions, values = nearest_rows(similarity, candidates, count)
        reached = np.unique(positions)
        density = np.ones(len(candidates))
        density[reached] = self.densities(table.embeddings[candidates[reached]], min(self.kde_neighbours, tenth), ctx)
        mass = np.zeros(len(candidates))
        np.add.at(mass, positions, self.masses(np.maximum(1 - values, 0), density[positions]))
        warn_of_massless(mass, table, candidates, budget, ctx)
        return budget.take(by_mass(mass, candidates), table.lengths)

    def densities(self, vectors: np.ndarray, count: int, ctx: Context) -> np.ndarray:
        """kde of every row over its ``count`` nearest among ``vectors`` (rows, width; unit length), (rows,)."""
        if self.sigma == 0:
            return np.ones(len(vectors))
        if len(vectors) > SLOW_FROM:
            ctx.report.note(
                f"knn_kde compares {len(vectors):,} rows with each other, {len(vectors) ** 2:.1e} products: lower "
                "select.picker.neighbours, or use picker=knn_uniform, if that takes too long"
            )
        result = np.empty(len(vectors))
        count = min(count, len(vectors))
        for start in range(0, len(vectors), AT_ONCE):
            products = vectors[start : start + AT_ONCE] @ vectors.T
            nearest = np.partition(products, len(vectors) - count, axis=1)[:, len(vectors) - count :]
            kernel = 1 - 2 * np.maximum(1 - nearest.astype(np.float64), 0) / self.sigma**2
            result[start : start + AT_ONCE] = np.maximum(kernel, 0).sum(axis=1)
        return result

    def masses(self, distances: np.ndarray, densities: np.ndarray) -> np.ndarray:
        """Mass of each query's neighbours, (queries, neighbours), summing to 1; ``distances`` ascend along a row."""
        queries, most = distances.shape
        if most < 2:
            return np.full(distances.shape, 1 / queries)
        level = np.cumsum(1 / densities, axis=1)
        spent = np.cumsum(distances / densities, axis=1)
        costs = distances[:, 1:] * level[:, :-1] - spent[:, :-1]  # of a query whose level has passed neighbour k
        steps = np.diff(costs, axis=1, prepend=0).reshape(-1)
        order = np.argsort(level[:, :-1].reshape(-1), kind="stable")
        enough = np.flatnonzero(self.alpha / self.c * np.cumsum(steps[order]) >= (1 - self.alpha) * queries)
        stop = level[:, :-1].reshape(-1)[order[enough[0] if len(enough) else -1]]
        filled = np.minimum(level / stop, 1)
        filled[:, -1] = 1
        return np.diff(filled, axis=1, prepend=0) / queries
