"""All that is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "everything")
@dataclass
class Everything(Picker):
    """Every row that the scorer admits, in the order of the pool. Takes no budget."""

    budget_use: ClassVar[Literal["required", "optional", "none"]] = "none"
    needs_scores: ClassVar[bool] = False

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        return np.sort(candidates)
