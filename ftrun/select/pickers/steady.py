"""High scores that noise does not move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table, ranked

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "steady")
@dataclass
class Steady(Picker):
    """Of the 2b highest scores the b with the least spread, least first (Fu et al., 2025, "T-SHIRT", arXiv:2506.01317).

    Ties go to the lower id. A budget in tokens is doubled in tokens.
    """

    oversampling: float = 2.0  # how many times the budget the first cut takes by score
    spread: str = ""  # column with the spread; empty: that of the score, such as s_ifd_std

    def __post_init__(self) -> None:
        if self.oversampling < 1:
            raise ConfigError(
                "the first cut must hold the budget",
                f"select.picker.oversampling={self.oversampling:g}",
                "Give 1 or more.",
            )

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        spread = self.spread or f"{column}_std"
        if spread not in table.columns:
            raise ConfigError(
                f"picker=steady needs the spread of every score, and there is no column {spread}",
                todo=f"Use select=tshirt, or select.picker.spread=COLUMN. Columns: {', '.join(table.columns)}.",
            )
        wide = Budget(
            rows=None if budget.rows is None else int(budget.rows * self.oversampling + 1e-9),
            tokens=None if budget.tokens is None else int(budget.tokens * self.oversampling + 1e-9),
        )
        highest = np.sort(wide.take(ranked(table, candidates, column), table.lengths))
        return budget.take(highest[np.argsort(table.columns[spread][highest], kind="stable")], table.lengths)
