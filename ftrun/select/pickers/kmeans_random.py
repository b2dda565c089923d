"""Random rows, spread over clusters of the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.embed import embed_rows
from ftrun.select.scorers.random import row_numbers

if TYPE_CHECKING:
    from ftrun.context import Context

MINI_BATCH_FROM = 100_000  # rows from which full k-means would take hours


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

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        pool = table.pool
        assert pool is not None
        if table.embeddings is None:
            table.embeddings = embed_rows(pool, ctx, self.embedding, self.of)
        numbers = row_numbers(pool, ctx.seed, "kmeans_random")
        # by content, not by id: neither clusters nor picks may depend on the order of the pool
        order = candidates[np.argsort(numbers[candidates], kind="stable")]
        cluster = self._clusters(table.embeddings[order], ctx)
        return budget.take(order[in_turns(cluster)], table.lengths)

    def _clusters(self, embeddings: np.ndarray, ctx: Context) -> np.ndarray:
        """Cluster of every row, (rows,)."""
        try:
            from sklearn.cluster import KMeans, MiniBatchKMeans
        except ImportError:
            raise ConfigError(
                "picker=kmeans_random needs the package scikit-learn", todo="pip install scikit-learn"
            ) from None
        distinct = len(np.unique(embeddings.round(6), axis=0))
        if distinct < self.clusters:
            ctx.report.note(
                f"kmeans_random makes {distinct} clusters instead of {self.clusters}: so many different texts there are"
            )
        kind: Any = MiniBatchKMeans if len(embeddings) >= MINI_BATCH_FROM else KMeans
        k = min(self.clusters, distinct)
        model = kind(n_clusters=k, max_iter=self.iterations, n_init=self.restarts, random_state=ctx.seed)
        return model.fit_predict(embeddings.astype(np.float64))


def in_turns(cluster: np.ndarray) -> np.ndarray:
    """Positions dealt out one from each cluster in turn, within a cluster as they come, (rows,).

    Every prefix then holds an equal share of each cluster, up to one row and to what the cluster has. Clusters take
    turns in the order of their first member, which is random when the rows are.
    """
    turn = np.empty(len(cluster), np.int64)
    first = np.empty(len(cluster), np.int64)
    for number in np.unique(cluster):
        members = np.flatnonzero(cluster == number)
        turn[members], first[members] = np.arange(len(members)), members[0]
    return np.lexsort((first, turn))
