"""Rows drawn as demonstrations."""

from __future__ import annotations

import numpy as np
import pytest

from ftrun.data.records import Record
from ftrun.tokens.demonstrations import draw_rows


def rows(count: int, same: int = 0) -> list[Record]:
    """The first ``same`` rows say the same."""
    return [Record(n, "labels", text=f"<{max(n, same - 1)}>", label=n % 3) for n in range(count)]


def test_every_other_row_is_drawn_as_often():
    made, generator = rows(40), np.random.default_rng(0)
    drawn = [[row.id for row in draw_rows(made, 5, made[7], generator)] for _ in range(2000)]
    assert all(len(set(ids)) == 5 for ids in drawn)
    for place in range(5):  # in any order
        counts = np.bincount([ids[place] for ids in drawn], minlength=40)
        assert counts[7] == 0 and abs(np.delete(counts, 7) - 2000 / 39).max() < 5 * np.sqrt(2000 / 39)


@pytest.mark.parametrize(("count", "found"), [(0, 0), (3, 3), (9, 5)])
def test_rows_that_say_the_same_as_the_query_are_passed_over(count, found):
    """Nearly all do, so that a few draws seldom meet another."""
    made = rows(100, same=95)
    drawn = draw_rows(made, count, made[0], np.random.default_rng(1))
    assert len({row.id for row in drawn}) == len(drawn) == found
    assert all(row.id >= 95 for row in drawn)


def test_rows_of_other_labels():
    made = rows(9)
    drawn = draw_rows(made, 20, made[0], np.random.default_rng(2), other_labels=True)
    assert sorted(row.id for row in drawn) == [1, 2, 4, 5, 7, 8]
