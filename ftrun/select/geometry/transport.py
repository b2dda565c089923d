"""Optimal transport from queries to rows, smoothed by entropy, in blocks and in logarithms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ftrun.training.context import Context

ROWS_AT_ONCE = 8192
SLOW_FROM = 10**9  # entries of the matrix from which an iteration takes many seconds


@dataclass
class Plan:
    """``exp(queries[i] + rows[j] - cost[i, j] / epsilon)`` is the mass that query i sends to row j."""

    queries: np.ndarray  # (queries,)
    rows: np.ndarray  # (rows,)
    mass: np.ndarray  # (rows,) that arrives at each row


def sinkhorn(
    similarity: np.ndarray,
    rows: np.ndarray,
    slope: float,
    epsilon: float,
    ctx: Context,
    row_penalty: float = float("inf"),
    momentum: float = 1.0,
    threshold: float = 1e-6,
    iterations: int = 1000,
) -> Plan:
    """Move equal masses of the queries to equal masses of the rows at ``cost = slope (1 - similarity[:, rows])``.

    Minimises <P, cost> + epsilon sum P log P with the queries' masses exact and the rows' within
    ``row_penalty * KL``; infinity makes them exact too. ``momentum`` above 1 overshoots each update of the rows.
    Stops when the queries' masses are met to ``threshold``, and warns when ``iterations`` are not enough.
    """
    queries, count = len(similarity), len(rows)
    if queries * count > SLOW_FROM:
        ctx.report.note(f"each iteration of the transport passes over {queries:,} x {count:,} similarities")
    share = row_penalty / (row_penalty + epsilon) if np.isfinite(row_penalty) else 1.0
    log_query, log_row = -np.log(queries), -np.log(count)
    by_row = np.zeros(count)
    incoming = np.empty(count)
    reached = _log_sums(similarity, rows, by_row, slope / epsilon)
    error = float("inf")
    for _ in range(iterations):
        by_query = log_query - reached
        total = _LogSum(queries)
        for start in range(0, count, ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            kernel = _kernel(similarity, rows[part], slope / epsilon)
            incoming[part] = _log_sum(kernel + by_query[:, None], axis=0)
            by_row[part] += momentum * (share * (log_row - incoming[part]) - by_row[part])
            total.add(kernel + by_row[part])
        reached = total.value()
        error = float(np.abs(np.exp(by_query + reached) - 1 / queries).sum())
        if error <= threshold:
            break
    else:
        ctx.report.warn(
            f"the transport is not settled after {iterations} iterations: the queries' masses are off by {error:.1e}"
        )
    return Plan(by_query, by_row, np.exp(by_row + incoming))


class _LogSum:
    """log sum exp of each row of blocks that come one after the other."""

    def __init__(self, rows: int):
        self.top, self.sum = np.full(rows, -np.inf), np.zeros(rows)

    def add(self, block: np.ndarray) -> None:
        top = np.maximum(self.top, block.max(axis=1))
        self.sum = self.sum * np.exp(self.top - top) + np.exp(block - top[:, None]).sum(axis=1)
        self.top = top

    def value(self) -> np.ndarray:
        return self.top + np.log(self.sum)


def _log_sums(similarity: np.ndarray, rows: np.ndarray, by_row: np.ndarray, steepness: float) -> np.ndarray:
    total = _LogSum(len(similarity))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        total.add(_kernel(similarity, rows[part], steepness) + by_row[part])
    return total.value()


def _kernel(similarity: np.ndarray, rows: np.ndarray, steepness: float) -> np.ndarray:
    """-cost / epsilon of these rows, (queries, rows) float64."""
    return steepness * (similarity[:, rows].astype(np.float64) - 1)


def _log_sum(values: np.ndarray, axis: int) -> np.ndarray:
    top = values.max(axis=axis, keepdims=True)
    return np.log(np.exp(values - top).sum(axis=axis)) + top.squeeze(axis)
