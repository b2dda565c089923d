"""No selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Scorer, Table

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context


@register("select", "none")
@dataclass
class NoSelection(Scorer):
    """Every row in its order, without scores. A picker that needs no score (kmeans_random) still picks."""

    column: ClassVar[str] = ""
    own_picker: ClassVar[str] = "everything"

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        return {}

    def keep(self, table: Table) -> np.ndarray:
        return np.ones(len(table), bool)
