"""Clusters of the rows of a pool, for the pickers that spread their choice over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ftrun.errors import ConfigError
from ftrun.select.base import Table
from ftrun.select.geometry.embed import embed_rows
from ftrun.select.row_numbers import row_numbers

if TYPE_CHECKING:
    from ftrun.training.context import Context

FITTED_A_CENTRE = 50  # rows a centre that k-means looks at; more move the centres little
FITTED_AT_LEAST = 20_000  # smaller pools are looked at whole
BLOCK = 16_384  # rows assigned at a time


@dataclass
class Clustering:
    """``rows``: (n,) places, in an order drawn from their content; ``label``: (n,); ``centres``: (clusters, width)."""

    rows: np.ndarray
    label: np.ndarray
    centres: np.ndarray


def check_kmeans(clusters: int, iterations: int, restarts: int) -> None:
    """Refuse counts below 1, before a pool is scored for nothing. Raises ConfigError."""
    for name, value in (("cluster", clusters), ("iteration", iterations), ("restart", restarts)):
        if value < 1:
            raise ConfigError(f"k-means needs at least one {name}", f"select.picker.{name}s={value}")


def embeddings_of(
    table: Table, ctx: Context, embedding: Literal["minilm", "model"], of: Literal["prompt", "row"]
) -> np.ndarray:
    """Embeddings of the pool, (rows, width): those of the scorer if it made some, else made here and kept."""
    if table.embeddings is None:
        assert table.pool is not None
        table.embeddings = embed_rows(table.pool, ctx, embedding, of)
    elif table.embeddings is ctx.scorer.embeddings:
        ctx.report.note(f"the picker uses the embeddings that select={ctx.settings.choice('select')} made")
    return table.embeddings


def by_content(table: Table, candidates: np.ndarray, ctx: Context, purpose: str) -> np.ndarray:
    """The candidates in a random order that follows from their content, the seed and ``purpose``, not from their places."""
    assert table.pool is not None
    return candidates[np.argsort(row_numbers(table.pool, ctx.seed, purpose)[candidates], kind="stable")]


def cluster_rows(
    table: Table, rows: np.ndarray, clusters: int, iterations: int, restarts: int, ctx: Context
) -> Clustering:
    """k-means over the embeddings of ``rows``, which come in an order drawn from their content.

    The first rows shape the centres, in one thread and so always alike; all are then assigned in blocks. Time is linear
    in the rows, and no copy of the embeddings is made. Raises ConfigError for counts below 1.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    check_kmeans(clusters, iterations, restarts)
    vectors = table.embeddings
    assert vectors is not None
    fitted = np.asarray(vectors[rows[: max(FITTED_AT_LEAST, FITTED_A_CENTRE * clusters)]], np.float32)
    distinct = len(np.unique(fitted.round(6), axis=0))
    if distinct < clusters:
        ctx.report.note(
            f"{picker_name(ctx)} makes {distinct} clusters instead of {clusters}: so many different texts there are"
        )
    kind: Any = KMeans  # its annotations know no number for n_init
    model = kind(min(clusters, distinct), max_iter=iterations, n_init=restarts, random_state=ctx.seed)
    with threadpool_limits(1):
        centres = model.fit(fitted).cluster_centers_
    return Clustering(rows, assign(vectors, rows, centres), centres)


def assign(vectors: np.ndarray, rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The nearest centre of each of ``rows``, (rows,); the first of equally near ones."""
    label = np.empty(len(rows), np.int64)
    half = (centres**2).sum(1) / 2
    for at in range(0, len(rows), BLOCK):
        part = np.asarray(vectors[rows[at : at + BLOCK]], centres.dtype)
        label[at : at + BLOCK] = (part @ centres.T - half).argmax(1)
    return label


def picker_name(ctx: Context) -> str:
    """How the user spells the picker at work."""
    return f"picker={ctx.settings.choice('picker')}"


def in_turns(cluster: np.ndarray) -> np.ndarray:
    """Positions dealt out one from each cluster in turn, within a cluster as they come, (rows,).

    Every prefix then holds an equal share of each cluster, up to one row and to what the cluster has. Clusters take
    turns in the order of their first member, which is random when the rows are.
    """
    turn, first = places_within(cluster)
    return np.lexsort((first, turn))


def places_within(cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of its cluster come before each position, and the first position of its cluster, both (rows,)."""
    order = np.argsort(cluster, kind="stable")
    starts = np.flatnonzero(np.diff(cluster[order], prepend=cluster[order[:1]] - 1))
    sizes = np.diff(np.append(starts, len(cluster)))
    turn, first = np.empty(len(cluster), np.int64), np.empty(len(cluster), np.int64)
    turn[order] = np.arange(len(cluster)) - np.repeat(starts, sizes)
    first[order] = np.repeat(order[starts], sizes)
    return turn, first
