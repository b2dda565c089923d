"""Paired standard errors."""

from __future__ import annotations

import numpy as np
import pytest

from ftrun.reporting.changes import changes
from ftrun.reporting.paired import paired_errors


def test_equal_weights_give_the_textbook_error():
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=20), rng.normal(size=20)
    before = [{"id": i, "score": float(value)} for i, value in enumerate(old)]
    after = [{"id": i, "score": float(value)} for i, value in enumerate(new)]
    expected = np.std(new - old, ddof=1) / np.sqrt(20)
    assert paired_errors(before, after)["accuracy"] == pytest.approx(expected)


def test_a_common_shift_is_certain():
    """Rows differ widely, all fall by the same amount: the change is no noise."""
    before = [{"id": i, "tokens": 10 + i, "loss": float(i), "correct": i} for i in range(9)]
    after = [row | {"loss": row["loss"] - 0.1} for row in before]
    errors = paired_errors(before, after)
    assert errors["loss"] == pytest.approx(0, abs=1e-12)
    results = [{"heldout": {"loss": {"value": value, "stderr": 1.0, "n": 9}}} for value in (5.0, 4.9)]
    assert changes(*results)[0].verdict == "within noise"
    assert changes(*results, {"heldout": errors})[0].verdict == "better"


def test_rows_without_a_partner_do_not_count():
    assert paired_errors([{"id": 1, "score": 1}], [{"id": 2, "score": 0}, {"id": 1, "score": 0}]) == {}
