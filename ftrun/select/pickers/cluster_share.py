"""The best part of every cluster."""

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


@register("picker", "cluster_share")
@dataclass
class ClusterShare(Picker):
    """The same share of every cluster, its highest scores (Lv et al., 2025, arXiv:2504.12687).

    The prompts are clustered with k-means; of the rows that the scorer admits, each cluster gives
    floor(ratio x its rows). A budget, if there is one, cuts the list, which holds the clusters in proportion at
    every length.
    """

    ratio: float = 0.4  # share of the admitted rows of each cluster
    clusters: int = 10  # K
    embedding: Literal["minilm", "model"] = "minilm"  # all-MiniLM-L6-v2, or the mean hidden state of the scoring model
    of: Literal["prompt", "row"] = "prompt"  # text that is embedded
    iterations: int = 300  # of k-means, at most
    restarts: int = 5  # k-means runs, of which the tightest counts

    budget_use: ClassVar[Literal["required", "optional", "none"]] = "optional"

    def __post_init__(self) -> None:
        check_kmeans(self.clusters, self.iterations, self.restarts)
        if not 0 < self.ratio <= 1:
            raise ConfigError("ratio is a share above 0 and up to 1", f"select.picker.ratio={self.ratio}")

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        embeddings_of(table, ctx, self.embedding, self.of)
        rows = by_content(table, candidates, ctx, "cluster_share")
        found = cluster_rows(table, rows, self.clusters, self.iterations, self.restarts, ctx)
        best = np.argsort(-table.columns[column][rows], kind="stable")
        rows, label = rows[best], found.label[best]
        size = np.bincount(label)[label]
        place = places_within(label)[0]
        taken = place < np.floor(self.ratio * size + 1e-9)  # 0.29 * 100 is 28.999999999999996 in floating point
        in_proportion = np.argsort((place / size)[taken], kind="stable")
        return budget.take(rows[taken][in_proportion], table.lengths)
