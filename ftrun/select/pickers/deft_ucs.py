"""A random part, and the core of every cluster of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.geometry.cluster import (
    BLOCK,
    Clustering,
    by_content,
    check_kmeans,
    cluster_rows,
    embeddings_of,
    in_turns,
)

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "deft_ucs")
@dataclass
class DeftUcs(Picker):
    """Unsupervised core-set selection (Das et al., 2024, "DEFT-UCS", arXiv:2310.16776).

    A random part of the budget comes first. The other rows are embedded and clustered; of A rows a cluster, alpha A are
    those nearest to the centroid by cosine distance (easy) and the rest those farthest (hard). A follows from the
    budget; a cluster of fewer rows is taken whole, and the others give what it lacks.
    """

    clusters: int = 7  # K; in the paper one a task
    alpha: float = 0.0  # share of easy rows, the nearest; 0: only the farthest
    base: float = 0.92  # share of the budget that is drawn at random; the paper: 30% of the pool out of 32.5%
    embedding: Literal["minilm", "model"] = "minilm"  # all-MiniLM-L6-v2, or the mean hidden state of the scoring model
    of: Literal["prompt", "row"] = "row"  # text that is embedded
    iterations: int = 300  # of k-means, at most
    restarts: int = 5  # k-means runs, of which the tightest counts

    needs_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_kmeans(self.clusters, self.iterations, self.restarts)
        if not (0 <= self.alpha <= 1 and 0 <= self.base <= 1):
            raise ConfigError(
                "alpha and base are shares", f"select.picker.alpha={self.alpha} select.picker.base={self.base}"
            )

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        rows = by_content(table, candidates, ctx, "deft_ucs")
        first, second = self._parts(budget)
        base = first.take(rows, table.lengths)
        rest = rows[len(base) :]
        if self.base == 1 or not len(rest):
            return base
        embeddings_of(table, ctx, self.embedding, self.of)
        core = core_set(
            cluster_rows(table, rest, self.clusters, self.iterations, self.restarts, ctx), table, self.alpha
        )
        if second.tokens is not None and budget.tokens is not None:  # what the base left over is not lost
            second = Budget(tokens=budget.tokens - int(table.lengths[base].sum()))
        return np.concatenate([base, second.take(core, table.lengths)])

    def _parts(self, budget: Budget) -> tuple[Budget, Budget]:
        """The budget of the random part, and that of the core."""
        if budget.rows is not None:
            base = int(self.base * budget.rows + 1e-9)
            return Budget(rows=base), Budget(rows=budget.rows - base)
        assert budget.tokens is not None
        base = int(self.base * budget.tokens + 1e-9)
        return Budget(tokens=base), Budget(tokens=budget.tokens - base)


def core_set(found: Clustering, table: Table, alpha: float) -> np.ndarray:
    """All rows of the clusters, easy and hard in turn: A rows a cluster are floor(alpha A) nearest, the rest farthest."""
    assert table.embeddings is not None
    distance = np.concatenate(
        [
            _cosine_distance(table.embeddings[found.rows[part]], found.centres[found.label[part]])
            for part in np.array_split(np.arange(len(found.rows)), -(-len(found.rows) // BLOCK))
        ]
    )
    order = np.empty(len(found.rows), np.int64)
    for cluster in np.unique(found.label):
        members = np.flatnonzero(found.label == cluster)
        order[members] = members[np.argsort(distance[members], kind="stable")][_near_and_far(len(members), alpha)]
    return found.rows[order][in_turns(found.label[order])]


def _near_and_far(count: int, alpha: float) -> np.ndarray:
    """Places 0 .. count - 1 so that the first A are floor(alpha A) from the front and the rest from the back."""
    easy = np.floor(alpha * np.arange(count + 1) + 1e-9).astype(np.int64)
    hard = np.arange(count + 1) - easy
    return np.where(np.diff(easy) > 0, easy[1:] - 1, count - hard[1:])


def _cosine_distance(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1) * np.linalg.norm(centres, axis=1)
    return 1 - np.einsum("ij,ij->i", vectors, centres) / np.maximum(length, 1e-12)
