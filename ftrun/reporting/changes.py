"""What training did to every metric: before, after, and whether the change is good."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ftrun.evaluation.base import higher_is_better
from ftrun.runs import numbers

NEUTRAL = ("length", "tokens", "count")  # neither more nor less of it is better
NOISE = 1.96  # standard errors that a change must exceed to be called one

Verdict = Literal["better", "worse", "within noise", "changed", "same", ""]


@dataclass(frozen=True)
class Measured:
    """A value with its standard error (None: unknown) over n rows."""

    value: float
    stderr: float | None = None
    n: int = 0

    @classmethod
    def read(cls, raw: Any) -> Measured | None:
        """From an entry of results.json; null counts as NaN; anything without a value is None."""
        if isinstance(raw, Mapping) and "value" in raw:
            error = number(raw.get("stderr"))
            return cls(number(raw["value"]), error if math.isfinite(error) else None, int(raw.get("n") or 0))
        return None


@dataclass(frozen=True)
class Change:
    """One metric of one evaluator; either side may be missing."""

    evaluator: str
    metric: str
    before: Measured | None
    after: Measured | None
    higher_is_better: bool | None  # None: the metric has no better side
    paired: float | None = None  # standard error of the change, where the same rows were measured twice

    @property
    def delta(self) -> float | None:
        """After minus before; None when one of them is missing."""
        return self.after.value - self.before.value if self.before and self.after else None

    @property
    def stderr(self) -> float | None:
        """Standard error of the change; without paired rows both sides count as independent. None when unknown."""
        if self.paired is not None:
            return self.paired
        if not (self.before and self.after) or self.before.stderr is None or self.after.stderr is None:
            return None
        return math.hypot(self.before.stderr, self.after.stderr)

    @property
    def _single(self) -> bool:
        """Whether one row is all that speaks for the change."""
        return self.after is not None and self.after.n == 1

    @property
    def amount(self) -> str:
        """Size of the change with the decimals of the smallest error there is, without a sign."""
        errors = [side.stderr for side in (self.before, self.after) if side and side.stderr]
        errors += [self.paired] if self.paired else []
        return numbers.pair(abs(self.delta), min(errors, default=None))[0] if self.delta is not None else ""

    @property
    def direction(self) -> int:
        """1 up, -1 down, 0 for a change that rounds to nothing at the decimals that are shown."""
        if self.delta is None or not any(digit in self.amount for digit in "123456789"):
            return 0
        return 1 if self.delta > 0 else -1

    @property
    def verdict(self) -> Verdict:
        if self.delta is None or not math.isfinite(self.delta):
            return ""
        if self.delta == 0:
            return "same"
        if self.stderr is not None and abs(self.delta) < NOISE * self.stderr:
            return "within noise"
        if self.higher_is_better is None or self._single:
            return "changed"
        return "better" if (self.delta > 0) == self.higher_is_better else "worse"


def changes(
    before: Mapping[str, Any], after: Mapping[str, Any], paired: Mapping[str, Mapping[str, float]] | None = None
) -> list[Change]:
    """All metrics of two results files, in the order of the later one; what was measured on other rows is no change.

    ``paired`` holds what ``paired_errors`` found, by evaluator.
    """
    names = {
        (evaluator, metric): None
        for results in (after, before)
        for evaluator in results
        for metric in _metrics(results, evaluator)
    }
    made = []
    for evaluator, metric in names:
        old, new = (_metrics(results, evaluator).get(metric) for results in (before, after))
        if new is not None and not same_rows(before.get(evaluator), after.get(evaluator)):
            old = None
        up = next(
            (raw["higher_is_better"] for raw in (new, old) if isinstance(raw, Mapping) and "higher_is_better" in raw),
            None,
        )
        sides = Measured.read(old), Measured.read(new)
        if any(sides):
            errors = (paired or {}).get(evaluator, {})
            error = errors.get(metric)
            if metric == "perplexity" and "loss" in errors and sides[1]:
                error = sides[1].value * errors["loss"]  # first order: d exp(x) = exp(x) dx
            made.append(Change(evaluator, metric, *sides, _direction(metric, up), error))
    return made


def same_rows(before: Any, after: Any) -> bool:
    """Whether an evaluator asked the same rows in the same way both times, as its metrics say; results may not say it."""
    asked = [
        {metric.get("rows") for metric in metrics.values() if isinstance(metric, Mapping)}
        if isinstance(metrics, Mapping)
        else set()
        for metrics in (before, after)
    ]
    return not (asked[0] and asked[1]) or asked[0] == asked[1]


def _metrics(results: Mapping[str, Any], evaluator: str) -> Mapping[str, Any]:
    metrics = results.get(evaluator)
    return metrics if isinstance(metrics, Mapping) else {}


def _direction(metric: str, said: Any) -> bool | None:
    if any(word in metric.lower().split("_") for word in NEUTRAL):
        return None
    return higher_is_better(metric) if said is None else bool(said)


def number(value: Any) -> float:
    """A float of any JSON value; NaN when it is none."""
    if isinstance(value, str | int | float):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return math.nan
    return math.nan
