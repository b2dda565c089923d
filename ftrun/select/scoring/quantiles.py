"""Percentiles of more numbers than fit into memory, exact."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ftrun.runs.artifacts import disk_guard

HALF = 1 << 16


@contextmanager
def rows_on_disk(rows: int, columns: int, folder: Path) -> Iterator[np.ndarray]:
    """A float32 array (rows, columns) in an unnamed file that goes with the process. Raises ResourceError on a full disk."""
    with disk_guard(folder / "token scores"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            # a hole that cannot be filled later would kill the process instead of raising
            os.posix_fallocate(file.fileno(), 0, max(1, 4 * rows * columns))
            yield np.memmap(file, np.float32, "r+", shape=(rows, columns))


def percentile(parts: Iterable[np.ndarray], q: float) -> float:
    """The ``q``-th percentile of the absolute values of all parts together, with linear interpolation.

    ``parts`` is read several times, one float32 array at a time. Bits of floats that are not negative order as the
    floats do, so two histograms of 65536 buckets find a value exactly.
    """
    coarse = sum(np.bincount(_bits(part) >> 16, minlength=HALF) for part in parts)
    count = int(np.sum(coarse))
    place = q / 100 * (count - 1)
    low = int(place)
    lower = _value_at(parts, coarse, low)
    if low == place:
        return lower
    upper = _value_at(parts, coarse, low + 1)
    return lower + (upper - lower) * (place - low)


def _value_at(parts: Iterable[np.ndarray], coarse: Any, rank: int) -> float:
    """The value with ``rank`` smaller ones before it; ``coarse`` counts the upper halves of the bits."""
    upper = int(np.searchsorted(np.cumsum(coarse), rank, side="right"))
    rank -= int(np.sum(coarse[:upper]))
    fine: Any = 0
    for part in parts:
        bits = _bits(part)
        fine = fine + np.bincount(bits[bits >> 16 == upper] & (HALF - 1), minlength=HALF)
    lower = int(np.searchsorted(np.cumsum(fine), rank, side="right"))
    return float(np.array([upper << 16 | lower], np.uint32).view(np.float32)[0])


def _bits(part: np.ndarray) -> np.ndarray:
    return np.abs(np.asarray(part, np.float32)).view(np.uint32)
