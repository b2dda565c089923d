"""Random rows, spread over clusters of the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.geometry.cluster import by_content, check_kmeans, cluster_rows, embeddings_of, in_turns

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "kmeans_random")
@dataclass
class KMeansRandom(Picker):
    """An equal number of random rows from every cluster (Yu et al., 2024, "Diversify and Conquer", arXiv:2409.11378).

    The prompts are embedded and clustered with k-means; each of the K clusters gives budget / K rows, drawn uniformly
    without replacement. What does not divide, and what small clusters cannot give, is spread over the others one row
    at a time, so that the budget is met exactly. Scores play no part beyond the scorer's filter.
    """

    clusters: int = 512  # K
    embedding: Literal["minilm", "model"] = "minilm"  # all-MiniLM-L6-v2, or the mean hidden state of the scoring model
    of: Literal["prompt", "row"] = "prompt"  # text that is embedded
    iterations: int = 300  # of k-means, at most
    restarts: int = 5  # k-means runs, of which the tightest counts

    needs_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_kmeans(self.clusters, self.iterations, self.restarts)

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        embeddings_of(table, ctx, self.embedding, self.of)
        rows = by_content(table, candidates, ctx, "kmeans_random")
        found = cluster_rows(table, rows, self.clusters, self.iterations, self.restarts, ctx)
        return budget.take(rows[in_turns(found.label)], table.lengths)
