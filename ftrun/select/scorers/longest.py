"""Selection by length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.data.counts import count_tokens
from ftrun.registry import register
from ftrun.select.base import Scorer

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context


@register("select", "longest")
@dataclass
class Longest(Scorer):
    """The rows with the most tokens (Xia et al., 2024, arXiv:2410.09335).

    total = tokens of all turns; response = tokens of the last answer only. Template and special tokens do not count.
    """

    of: Literal["total", "response"] = "total"  # which tokens count: the whole row, or its last answer

    column: ClassVar[str] = "tokens"

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Token counts, (rows,); NaN for a row without text, or without a response where that is what counts."""
        if self.of == "total":
            counts = ctx.scorer.row_tokens(pool)
        else:
            counts = count_tokens(ctx.scorer.tokenizer, (record.response for record in pool))
        empty = counts == 0
        why = "no text" if self.of == "total" else "no response"
        ctx.scorer.reasons |= dict.fromkeys(np.flatnonzero(empty).tolist(), why)
        return {"tokens": np.where(empty, np.nan, counts)}
