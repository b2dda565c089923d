"""What an evaluator is: metrics of a model, each with its standard error and count, and its predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.errors import ConfigError

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


LOWER_IS_BETTER = ("loss", "perplexity", "ppl", "nll", "error", "bits_per", "ece", "brier", "latency", "mse", "mae")


@dataclass
class Metric:
    value: float
    stderr: float | None = None  # standard error of the mean
    n: int = 0  # rows (or tokens) behind the value
    higher_is_better: bool = True

    @classmethod
    def mean(cls, values: Iterable[float], higher_is_better: bool = True) -> Metric:
        """Mean and standard error of per-row values."""
        numbers = [float(value) for value in values]
        n = len(numbers)
        mean = math.fsum(numbers) / n if n else math.nan
        variance = math.fsum((x - mean) ** 2 for x in numbers) / (n - 1) if n > 1 else math.nan
        return cls(mean, math.sqrt(variance / n) if n > 1 else None, n, higher_is_better)


@dataclass
class Evaluation:
    metrics: dict[str, Metric]
    predictions: list[dict[str, Any]] = field(default_factory=list)  # one a row, JSON values


@dataclass
class Evaluator:
    needs: ClassVar[dict[str, str]] = {}
    lacks: ClassVar[dict[str, str]] = {}
    asks_heldout: ClassVar[bool] = False  # measures on the rows that were held out, and on no others

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        """Evaluate ``bundle.model`` (already in eval mode, no gradients)."""
        raise NotImplementedError


def nothing_held_out(evaluator: str, ctx: Context) -> ConfigError:
    """The error of an evaluator that has no rows."""
    return ConfigError(
        f"eval={evaluator} has no rows: none were held out",
        f"data.heldout={ctx.settings.data.heldout:g}",
        "Raise data.heldout, set data.heldout_path, or leave out this evaluator.",
    )


def higher_is_better(metric: str) -> bool:
    """By the name, for results that do not say."""
    return not any(word in metric.lower() for word in LOWER_IS_BETTER)
