"""Random selection, the baseline that every selector has to beat."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Scorer

if TYPE_CHECKING:
    from ftrun.runs.context import Context
    from ftrun.data.pool import Pool


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


def row_numbers(pool: Pool, *seed: int | str) -> np.ndarray:
    """A uniform number in [0, 1) for every row, from its content hash and the seed, (rows,)."""
    copies: Counter[int] = Counter()
    numbers = np.empty(len(pool))
    for position, content in enumerate(pool.hashes.tolist()):
        numbers[position] = _uniform(f"{content}/{copies[content]}/{seed}")
        copies[content] += 1
    return numbers


def _uniform(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53  # the 53 bits that a float holds
