"""Scores within bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table, ranked

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "threshold")
@dataclass
class Threshold(Picker):
    """Every row whose score lies within the bounds, the highest first; a budget, if there is one, cuts the list."""

    minimum: float | None = None  # lowest score that is taken
    maximum: float | None = None  # highest score that is taken

    budget_use: ClassVar[Literal["required", "optional", "none"]] = "optional"

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        if self.minimum is None and self.maximum is None:
            raise ConfigError(
                "picker=threshold has no bound", todo="Set select.picker.minimum=... or select.picker.maximum=..."
            )
        order = ranked(table, candidates, column)
        scores = table.columns[column][order]
        within = np.ones(len(order), bool)
        if self.minimum is not None:
            within &= scores >= self.minimum
        if self.maximum is not None:
            within &= scores <= self.maximum
        return budget.take(order[within], table.lengths)
