"""How sure a change is, when the same rows were measured before and after: rows differ far more than they change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def paired_errors(before: Rows, after: Rows) -> dict[str, float]:
    """Standard errors of after minus before, by metric, from the predictions of one evaluator on the same rows.

    Rows with ``loss``, ``correct`` and ``tokens`` give loss and token_accuracy as token-weighted means (rows as
    clusters); ``score`` gives accuracy, ``finished`` finished. Rows that one side lacks are left out; fewer than two
    common rows give nothing.
    """
    earlier = {row.get("id"): row for row in before}
    pairs = [(earlier[row.get("id")], row) for row in after if row.get("id") in earlier]
    errors: dict[str, float] = {}
    if all(_has(row, "loss", "tokens") for pair in pairs for row in pair):
        weights = [float(new["tokens"]) for _, new in pairs]
        errors["loss"] = _error([float(new["loss"]) - float(old["loss"]) for old, new in pairs], weights)
        if all(_has(row, "correct") for pair in pairs for row in pair):
            right = [
                (float(new["correct"]) - float(old["correct"])) / max(1.0, float(new["tokens"])) for old, new in pairs
            ]
            errors["token_accuracy"] = _error(right, weights)
    for metric, column in (("accuracy", "score"), ("finished", "finished")):
        if pairs and all(_has(row, column) for pair in pairs for row in pair):
            errors[metric] = _error([float(new[column]) - float(old[column]) for old, new in pairs], [1.0] * len(pairs))
    return {metric: error for metric, error in errors.items() if math.isfinite(error)}


def _has(row: Mapping[str, Any], *columns: str) -> bool:
    return all(isinstance(row.get(column), int | float) for column in columns)


def _error(values: Sequence[float], weights: Sequence[float]) -> float:
    """Standard error of the weighted mean (ratio estimator)."""
    n, total = len(values), sum(weights)
    if n < 2 or total <= 0:
        return math.nan
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    residuals = math.fsum((w * (v - mean)) ** 2 for w, v in zip(weights, values, strict=True))
    return math.sqrt(residuals * n / (n - 1)) / total
