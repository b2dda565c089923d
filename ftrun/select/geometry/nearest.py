"""Rows and queries compared: the matrix of their similarities, and the nearest rows of a query."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ftrun import registry
from ftrun.errors import ComponentError, ConfigError, DataError, ResourceError
from ftrun.runs.memory import available_bytes
from ftrun.select.base import Budget, Table
from ftrun.training.scoring import Similarity

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.select.queries import Queries
    from ftrun.training.context import Context

ROWS_AT_ONCE = 4096
ALIGNED = 16  # queries of a product come in multiples of this, rows in whole blocks: then every product rounds alike
SAID_FROM = 2**28  # bytes from which the report names the size of the matrix


def similarities(queries: np.ndarray, rows: np.ndarray, task: np.ndarray, ctx: Context) -> Similarity:
    """`products` as what pickers read. Raises ResourceError where memory has no room for it."""
    check_room(len(queries), len(rows), ctx)
    return Similarity(products(queries, rows), task)


def products(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Products of query vectors (queries, width) with row vectors (rows, width): cosines if they have unit length.

    (queries, rows) float32, made in blocks of rows: 1,000 queries and a million rows take 4 GB.
    """
    width = queries.shape[1]
    padded = np.zeros((-(-len(queries) // ALIGNED) * ALIGNED, width), np.float32)
    padded[: len(queries)] = queries
    matrix = np.empty((len(queries), len(rows)), np.float32)
    block = np.zeros((ROWS_AT_ONCE, width), np.float32)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        block[: len(part)], block[len(part) :] = part, 0
        matrix[:, start : start + len(part)] = (padded @ block.T)[: len(queries), : len(part)]
    return matrix


def check_room(queries: int, rows: int, ctx: Context) -> None:
    """Say what the matrix takes when that is much. Raises ResourceError when it is more than there is."""
    size = 4 * queries * rows
    what = f"the similarities of {rows:,} rows to {queries:,} queries take {size / 1e9:.1f} GB"
    free = available_bytes(ctx.team.device) if ctx.team.device.type == "cpu" else float("inf")
    if size > free:
        raise ResourceError(
            f"{what} of memory, and {free / 1e9:.1f} GB are free",
            "select.queries",
            "Give fewer queries, or select from the pool in parts.",
        )
    if size >= SAID_FROM:
        ctx.report.note(f"{what} of memory")


def split_scored(
    vectors: np.ndarray, pool: Pool, queries: Queries, why: str, ctx: Context
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of rows, vectors of queries, and which rows have one; ``vectors`` holds both, rows first, zeros for none.

    ``why`` is the reason that is noted for rows without a vector. Raises DataError for such a query.
    """
    known: np.ndarray = np.any(vectors, axis=1)
    rows, wanted = vectors[: len(pool)], vectors[len(pool) :]
    for number in np.flatnonzero(~known[len(pool) :])[:1]:
        raise DataError(
            f"a query cannot be compared: {why}", origin_of(queries, int(number)), "Leave it out of select.queries."
        )
    ctx.scorer.reasons |= dict.fromkeys(np.flatnonzero(~known[: len(pool)]).tolist(), why)
    return rows, wanted, known[: len(pool)]


def origin_of(queries: Queries, number: int) -> str:
    """``file:line`` of a query."""
    for pool in queries.pools:
        if number < len(pool):
            return pool.origin(int(pool.ids[number]))
        number -= len(pool)
    raise IndexError(number)


def nearest_query(similarity: Similarity, known: np.ndarray) -> np.ndarray:
    """Similarity of every row to the query that is nearest to it, (rows,); NaN where ``known`` is false."""
    return np.where(known, similarity.matrix.max(axis=0), np.nan).astype(np.float64)


def comparing_scorers() -> str:
    """Those that say how near rows are to queries, as a message names them."""
    *others, last = registry.marked("select", "gives_similarity")
    return f"select={', '.join(others)} or {last}"


def similarity_of(table: Table) -> Similarity:
    """The similarities that a picker works on. Raises ConfigError when the scorer made none."""
    if table.similarity is None:
        raise ConfigError(
            "this picker picks rows near your queries, and the scorer compares with none",
            todo=f"Use {comparing_scorers()}, or another picker.",
        )
    if table.similarity.matrix.shape[1] != len(table):
        raise ComponentError(
            f"the scorer compared {table.similarity.matrix.shape[1]} rows with the queries, and the pool has {len(table)}"
        )
    return table.similarity


def best_places(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the ``count`` highest values, highest first, ties by place."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    bar = np.partition(values, len(values) - count)[len(values) - count]
    above, level = np.flatnonzero(values > bar), np.flatnonzero(values == bar)
    found = np.concatenate([above, level[: count - len(above)]])
    return found[np.lexsort((found, -values[found]))]


def nearest_rows(similarity: Similarity, candidates: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` most similar candidates of each query, nearest first: positions in ``candidates``, and similarities.

    Both (queries, count).
    """
    positions = np.empty((len(similarity.matrix), count), np.int64)
    values = np.empty((len(similarity.matrix), count))
    for query, row in enumerate(similarity.matrix):
        row = row[candidates]
        positions[query] = best_places(row, count)
        values[query] = row[positions[query]]
    return positions, values


def by_mass(mass: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The candidates (ascending places) by falling mass, ties by place."""
    return candidates[np.argsort(-mass, kind="stable")]


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
