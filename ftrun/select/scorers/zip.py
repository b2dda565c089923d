"""How badly a row compresses."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Scorer
from ftrun.select.scoring.compressed import row_bytes

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context


@register("select", "zip")
@dataclass
class Zip(Scorer):
    """Rows with much to say for their length (Yin et al., 2024, "Entropy Law", arXiv:2407.06645).

    ``ratio`` = bytes / bytes after zlib, of the row alone; the ranked ``zip`` is its inverse, since a low ratio means
    little repetition. The paper's own picker goes on from there: what repeats rows that were taken before ranks lower.
    """

    column: ClassVar[str] = "zip"
    own_picker: ClassVar[str] = "zip"

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Compression ratio and its inverse, (rows,) each; NaN for a row without text."""
        ratios = np.full(len(pool), np.nan)
        for row, record in enumerate(pool):
            data = row_bytes(record)
            if data:
                ratios[row] = len(data) / len(zlib.compress(data, 9))
            else:
                ctx.scorer.reasons[row] = "no text"
        return {"zip": 1 / ratios, "ratio": ratios}
