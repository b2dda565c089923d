"""Random numbers that belong to a row: they follow from its content, wherever in a pool it stands."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ftrun.data.pool import Pool

CHUNK = 65_536  # rows whose hashes are Python numbers at a time


def row_numbers(pool: Pool, *seed: int | str) -> np.ndarray:
    """A uniform number in [0, 1) for every row, from its content hash and the seed, (rows,)."""
    hashes = pool.hashes
    values, counts = np.unique(hashes, return_counts=True)
    copies = dict.fromkeys(values[counts > 1].tolist(), 0)  # of rows that say what another one says
    del values, counts
    numbers = np.empty(len(pool))
    for start in range(0, len(pool), CHUNK):
        for position, content in enumerate(hashes[start : start + CHUNK].tolist(), start):
            copy = copies.get(content, 0)
            numbers[position] = _uniform(f"{content}/{copy}/{seed}")
            if content in copies:
                copies[content] = copy + 1
    return numbers


def _uniform(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53  # the 53 bits that a float holds
