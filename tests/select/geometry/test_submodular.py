"""Lazy greedy against the plain greedy and against the best of all sets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from ftrun.select.geometry.submodular import FacilityLocation, lazy_greedy


def value(utility: np.ndarray, chosen: list[int]) -> float:
    return float(sum(max(row[j] for j in chosen) for row in utility)) if chosen else 0.0


def plain_greedy(utility: np.ndarray) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < utility.shape[1]:
        left = [j for j in range(utility.shape[1]) if j not in chosen]
        gains = [value(utility, [*chosen, j]) - value(utility, chosen) for j in left]
        chosen.append(left[int(np.argmax(np.round(gains, 9)))])
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_lazy_greedy_is_greedy(seed):
    utility = np.random.default_rng(seed).random((12, 9))
    picked = list(lazy_greedy(FacilityLocation(utility), np.arange(9)))
    assert [candidate for candidate, _ in picked] == plain_greedy(utility)
    gains = [gain for _, gain in picked]
    assert gains == sorted(gains, reverse=True)
    assert sum(gains) == pytest.approx(value(utility, list(range(9))))


def test_ties_go_to_the_lower_candidate():
    utility = np.ones((4, 6))
    assert [candidate for candidate, _ in lazy_greedy(FacilityLocation(utility), np.array([5, 3, 1]))] == [1, 3, 5]


@pytest.mark.parametrize("seed", range(5))
def test_greedy_reaches_its_share_of_the_best(seed):
    utility = np.random.default_rng(seed).random((7, 8)) ** 4
    order = [candidate for candidate, _ in lazy_greedy(FacilityLocation(utility), np.arange(8))]
    for size in (1, 2, 3, 4):
        best = max(value(utility, list(chosen)) for chosen in combinations(range(8), size))
        assert value(utility, order[:size]) >= (1 - 1 / np.e) * best
