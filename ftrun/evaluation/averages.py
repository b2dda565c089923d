"""Numbers over many rows, with their standard errors."""

from __future__ import annotations

import math

import numpy as np


def ratio(totals: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """``sum(totals) / sum(counts)`` with its standard error over rows, both (rows,).

    Linearised ratio estimator (Cochran, Sampling Techniques, 1977, section 6.4); None for a single row.
    """
    n, all_counts = len(counts), math.fsum(counts)
    value = math.fsum(totals) / all_counts
    if n < 2:
        return value, None
    spread = math.fsum((totals - value * counts) ** 2)
    return value, math.sqrt(n / (n - 1) * spread) / all_counts


def macro_f1(gold: np.ndarray, answers: np.ndarray) -> float:
    """Mean over the classes that occur in either of ``2 * hits / (labels + answers)``."""
    classes = np.union1d(gold, answers)
    scores = []
    for label in classes:
        hits = np.sum((gold == label) & (answers == label))
        scores.append(2 * hits / (np.sum(gold == label) + np.sum(answers == label)))
    return float(np.mean(scores))
