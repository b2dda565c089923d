"""What the result sections say of single predictions and of changes."""

from __future__ import annotations

import pytest

from ftrun.reporting.changes import Change, Measured
from ftrun.reporting.markup import clipped, template_markers
from ftrun.reporting.results import _details, _prediction


def test_one_row_proves_nothing():
    sides = Measured(5.8, None, 1), Measured(5.7, None, 1)
    assert Change("heldout", "loss", *sides, higher_is_better=False).verdict == "changed"
    assert Change("heldout", "loss", sides[0], Measured(5.7, None, 2), higher_is_better=False).verdict == "better"


@pytest.mark.parametrize(("after", "direction"), [(1.8, 1), (1.2, -1), (1.5, 0), (1.5001, 0)])
def test_a_change_that_rounds_to_nothing_has_no_direction(after, direction):
    change = Change("heldout", "loss", Measured(1.5, 0.4, 9), Measured(after, 0.4, 9), higher_is_better=False)
    assert change.direction == direction


def test_markers_of_the_template_are_set_small_and_all_is_escaped():
    shown = clipped("<|im_start|>user\n<b>a</b><|im_end|></s>", 320, template_markers)
    assert shown.count('<span class="marker">') == 3
    assert "&lt;b&gt;a&lt;/b&gt;" in shown and "&lt;|im_start|&gt;</span>user" in shown


def test_details_say_where_an_answer_ended():
    row = {"id": 7, "prompt": "a", "output": "b", "metric": "exact_match", "score": 0.0, "finished": 0.0, "tokens": 48}
    assert _details(row) == "row 7 · checked by exact match · cut off after 48 tokens"
    assert _details(row | {"finished": 1.0, "note": "x"}) == "row 7 · checked by exact match · 48 tokens · note x"


def test_equal_answers_are_shown_once():
    row = {"id": 7, "prompt": "a", "output": "the same words", "score": 0.0}
    assert _prediction(row, dict(row)).count("the same words") == 1
    changed = _prediction(row, row | {"output": "other words"})
    assert "before" in changed and "after" in changed and "other words" in changed
