"""Random selection, the baseline that every selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Scorer
from ftrun.select.row_numbers import row_numbers

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context


@register("select", "random")
@dataclass
class Random(Scorer):
    """Rows drawn uniformly without replacement (Xia et al., 2024, arXiv:2410.09335, where few selectors beat it).

    Every row's number in [0, 1) follows from its content and ``seed`` alone, so the choice does not depend on the
    order of the pool; copies of a row get different numbers.
    """

    column: ClassVar[str] = "random"

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        return {"random": row_numbers(pool, ctx.seed)}
