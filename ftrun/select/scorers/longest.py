"""Selection by length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Scorer
from ftrun.select.scoring.texts import encode, row_text

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
        texts: list[str] = []
        owner: list[int] = []
        for position, record in enumerate(pool):
            found = row_text(record) if self.of == "total" else [record.response] if record.response else []
            texts += found
            owner += [position] * len(found)
            if not found:
                ctx.scorer.reasons[position] = "no text" if self.of == "total" else "no response"
        counts = np.array([len(ids) for ids in encode(ctx.scorer.tokenizer, texts)], float)
        tokens = np.bincount(owner, weights=counts, minlength=len(pool)) if owner else np.zeros(len(pool))
        tokens[np.bincount(owner, minlength=len(pool)) == 0] = np.nan
        return {"tokens": tokens}
