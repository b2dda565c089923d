"""Random numbers that belong to a row: they follow from its content, wherever in a pool it stands."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ftrun.data.pool import Pool


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
