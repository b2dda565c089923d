"""The first part of every cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.geometry.cluster import by_content, check_kmeans, cluster_rows, embeddings_of, places_within

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "first_chunk")
@dataclass
class FirstChunk(Picker):
    """The first of m near-equal chunks of every cluster, highest scores first (Mekala et al., 2024, arXiv:2402.10430).

    Rows are clustered with k-means. For a budget of p percent, m = round(100 / p): a cluster of n rows gives
    ceil(n / m). Many small clusters so give more than the budget: 1 percent of 52,000 rows in 1000 clusters comes to
    about 1000 rows. ``rounding=budget`` then takes the first row of every cluster before the second of any, the
    highest scores first, until the budget is met; where m was rounded up, the next chunks follow.
    """

    clusters: int = 1000  # K
    rounding: Literal["budget", "up"] = "budget"  # meet the budget, or take the whole first chunk as the authors do
    embedding: Literal["minilm", "model"] = "minilm"  # all-MiniLM-L6-v2, or the mean hidden state of the scoring model
    of: Literal["prompt", "row"] = "row"  # text that is embedded
    iterations: int = 300  # of k-means, at most
    restarts: int = 1  # k-means runs, of which the tightest counts; one as in the authors' code

    budget_use: ClassVar[Literal["required", "optional", "none"]] = "required"

    def __post_init__(self) -> None:
        check_kmeans(self.clusters, self.iterations, self.restarts)

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        embeddings_of(table, ctx, self.embedding, self.of)
        rows = by_content(table, candidates, ctx, "first_chunk")
        label = cluster_rows(table, rows, self.clusters, self.iterations, self.restarts, ctx).label
        chunks = self._chunks(table, candidates, budget)
        order, chunk = in_chunks(label, table.columns[column][rows], rows, chunks)
        if self.rounding == "up":
            return rows[order[chunk == 0]]
        return budget.take(rows[order], table.lengths)

    def _chunks(self, table: Table, candidates: np.ndarray, budget: Budget) -> int:
        """round(100 / p), p being the budget's share of the candidates."""
        asked = budget.rows if budget.rows is not None else budget.tokens
        there = len(candidates) if budget.rows is not None else int(table.lengths[candidates].sum())
        assert asked is not None
        if asked < 1:
            raise ConfigError("the budget holds no row", "budget", "Raise it.")
        return max(1, round(there / asked))


def in_chunks(label: np.ndarray, score: np.ndarray, place: np.ndarray, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions by chunk, by rank within the cluster, by falling score, by ``place``; and the chunk of each, both (rows,).

    A cluster of n rows falls into ``chunks`` parts of floor(n / chunks) rows, the first n mod chunks of them one longer.
    """
    best = np.lexsort((place, -score))
    rank = np.empty(len(label), np.int64)
    rank[best] = places_within(label[best])[0]
    size = np.bincount(label)[label]
    small, longer = size // chunks, size % chunks
    in_longer = longer * (small + 1)  # rows in the longer chunks
    chunk = np.where(rank < in_longer, rank // (small + 1), longer + (rank - in_longer) // np.maximum(small, 1))
    order = np.lexsort((place, -score, rank, chunk))
    return order, chunk[order]
