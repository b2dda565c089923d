"""Good rows, spread over clusters of the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.geometry.cluster import by_content, check_kmeans, cluster_rows, embeddings_of, in_turns
from ftrun.select.row_numbers import row_numbers

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "kmq")
@dataclass
class Kmq(Picker):
    """Rows drawn by quality from every cluster (Yu et al., 2024, "Diversify and Conquer", arXiv:2409.11378).

    The prompts are clustered with k-means. Each of the K clusters gives budget / K rows, drawn without replacement with
    p = softmax(quality / temperature) over the cluster; quality is the score. What does not divide, and what small
    clusters cannot give, is spread over the others one row at a time.
    """

    clusters: int = 512  # K
    temperature: float = 1.0  # of the softmax; scores of a wide range need a high one, or the best always win
    embedding: Literal["minilm", "model"] = "minilm"  # all-MiniLM-L6-v2, or the mean hidden state of the scoring model
    of: Literal["prompt", "row"] = "prompt"  # text that is embedded
    iterations: int = 300  # of k-means, at most
    restarts: int = 5  # k-means runs, of which the tightest counts

    def __post_init__(self) -> None:
        check_kmeans(self.clusters, self.iterations, self.restarts)
        if not self.temperature > 0:
            raise ConfigError("a temperature must be above 0", f"select.picker.temperature={self.temperature}")

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        embeddings_of(table, ctx, self.embedding, self.of)
        rows = by_content(table, candidates, ctx, "kmq")
        found = cluster_rows(table, rows, self.clusters, self.iterations, self.restarts, ctx)
        drawn = np.argsort(-self._keys(table, rows, column, ctx), kind="stable")
        return budget.take(rows[drawn][in_turns(found.label[drawn])], table.lengths)

    def _keys(self, table: Table, rows: np.ndarray, column: str, ctx: Context) -> np.ndarray:
        """Numbers whose falling order is a draw without replacement, (rows,).

        Softmax weights drawn one by one give the same orders, equally often, as logits plus Gumbel noise sorted.
        """
        assert table.pool is not None
        uniform = np.clip(row_numbers(table.pool, ctx.seed, "kmq draw")[rows], 2.0**-54, None)
        return table.columns[column][rows] / self.temperature - np.log(-np.log(uniform))
