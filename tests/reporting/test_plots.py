"""Ticks, thinning, smoothing and frames."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftrun.reporting.histograms import histogram
from ftrun.reporting.plots import robust_range, smooth, thin, ticks
from ftrun.select.audit import example_rows

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False)


@given(NUMBERS, st.floats(1e-9, 1e9), st.integers(3, 9))
def test_ticks_are_round_few_and_inside(low, width, count):
    high = low + width
    if high - low <= 1e-9 * max(1.0, abs(low)):
        return
    found = ticks(low, high, count)
    slack = 1e-6 * (high - low) + 1e-9
    assert 1 <= len(found) <= 2 * count + 2
    assert all(low - slack <= value <= high + slack for value in found)


def test_ticks_known():
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(1, 240, 8, whole=True) == [25, 50, 75, 100, 125, 150, 175, 200, 225]
    assert ticks(1, 3, 8, whole=True) == [1, 2, 3]
    assert ticks(2, 2) == [2]


def test_thinning_keeps_spikes():
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[[777, 54_321]] = 9.0, -9.0
    y[60_000:60_500] = np.nan
    few_x, few_y = thin(x, y, 600)
    assert len(few_x) <= 602
    assert {777.0, 54_321.0} <= set(few_x.tolist()) and np.nanmax(few_y) == 9.0 and np.nanmin(few_y) == -9.0
    assert np.isnan(few_y).any(), "a long gap stays a gap"
    assert (np.diff(few_x) > 0).all()


def test_smoothing_keeps_straight_lines_and_skips_gaps():
    line = np.linspace(3.0, 1.0, 101)
    assert smooth(line, 20) == pytest.approx(line)
    line[50] = np.nan
    assert np.isfinite(smooth(line, 10)).all()
    assert np.isnan(smooth(np.full(5, np.nan), 3)).all()


def test_one_outlier_does_not_flatten_the_rest():
    values = np.r_[np.linspace(1, 2, 100), 1e6]
    assert robust_range(values)[1] < 10
    assert robust_range(np.array([1.0, 100.0])) == (1.0, 100.0), "few values are all shown"
    assert robust_range(np.array([np.nan])) == (0.0, 1.0)
    low, high = robust_range(np.array([5.0, 5.0]))
    assert low < 5 < high


def test_histogram_counts_every_finite_row():
    values = np.r_[np.random.default_rng(0).normal(size=500), np.nan, 1e5]
    drawn = histogram(values, values > 0, "t", "x")
    counts = [int(text.split(": ")[1].split(" ")[0]) for text in drawn.split("<title>")[1:]]
    picked = [int(text.split(", ")[1].split(" ")[0]) for text in drawn.split("<title>")[1:]]
    assert sum(counts) == 501 and sum(picked) == int((values > 0).sum())


def test_example_rows_are_disjoint_and_ordered():
    score = np.r_[np.linspace(0, 1, 100), np.nan]
    selected = (score > 0.7) & (score < 0.9)
    groups = example_rows(selected, score)
    rows = np.concatenate(list(groups.values()))
    assert len(set(rows.tolist())) == len(rows) and 100 not in rows
    assert groups["Best of the choice"][0] == np.flatnonzero(selected)[-1]
    assert (score[groups["Left out although they score higher"]] >= 0.9).all()
    cut = groups["Around the cut"]
    assert selected[cut].sum() == 5 and (~selected[cut]).sum() == 5
    assert example_rows(np.zeros(3, bool), np.array([1.0, 2.0, 3.0]))["Lowest scores"].tolist() == [2, 1, 0]
