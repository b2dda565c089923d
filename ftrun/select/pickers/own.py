"""The picker of the scorer's paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ftrun import registry
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Scorer, Table

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "own")
@dataclass
class Own(Picker):
    """Picks as the scorer's paper does; for most scorers that is top_k."""

    def stands_for(self, scorer: Scorer) -> Picker:
        """The picker that stands behind it for this scorer."""
        return registry.build("picker", scorer.own_picker)

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        return self.stands_for(ctx.settings.component("select")).pick(table, candidates, column, budget, ctx)
