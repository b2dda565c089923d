"""Greedy maximisation of set functions whose gains only fall as the set grows."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Protocol

import numpy as np


class SetFunction(Protocol):
    """A submodular function of a growing set: what a candidate adds never rises by adding others."""

    def gain(self, candidate: int) -> float:
        """What the function grows by when ``candidate`` joins the set."""
        ...

    def add(self, candidate: int) -> None:
        """Let ``candidate`` join."""
        ...


def lazy_greedy(function: SetFunction, candidates: np.ndarray) -> Iterator[tuple[int, float]]:
    """Candidates by falling gain and the gain of each, one after the other until none is left; ties go to the lower one.

    The same order as computing all gains anew for every pick (Minoux, 1978): an old gain is an upper bound, so only
    candidates whose old gain is the highest are looked at again. The first ``k`` reach at least 1 - 1/e of the best
    value of any ``k`` where the function never falls (Nemhauser et al., 1978).
    """
    heap = [(-function.gain(candidate), candidate, 0) for candidate in np.asarray(candidates).tolist()]
    heapq.heapify(heap)
    picked = 0
    while heap:
        bound, candidate, seen = heap[0]
        if seen == picked:
            heapq.heappop(heap)
            function.add(candidate)
            picked += 1
            yield candidate, -bound
        else:
            heapq.heapreplace(heap, (-function.gain(candidate), candidate, picked))


class FacilityLocation:
    """``f(A) = sum_i max_{j in A} utility[i, j]``, 0 for the empty set; ``utility``: (represented, candidates), not negative."""

    def __init__(self, utility: np.ndarray):
        self.columns = np.ascontiguousarray(utility.T)
        self.best = np.zeros(utility.shape[0], utility.dtype)

    def gain(self, candidate: int) -> float:
        return float(np.maximum(self.columns[candidate] - self.best, 0).sum(dtype=np.float64))

    def add(self, candidate: int) -> None:
        np.maximum(self.best, self.columns[candidate], out=self.best)
