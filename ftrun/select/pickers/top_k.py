"""The highest scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table, ranked

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "top_k")
@dataclass
class TopK(Picker):
    """The rows with the highest scores that the budget holds; ties go to the lower id."""

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        if budget.rows is not None and 0 < budget.rows < len(candidates):
            below = -table.columns[column][candidates]
            last = np.partition(below, budget.rows - 1)[budget.rows - 1]  # only what can be chosen needs an order
            candidates = candidates[~(below > last)]
        return budget.take(ranked(table, candidates, column), table.lengths)
