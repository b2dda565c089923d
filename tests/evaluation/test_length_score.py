"""The length of generated answers against the length that their prompt states."""

from __future__ import annotations

import numpy as np
import pytest
from made_up_rows import Rows

from ftrun.data.records import Message, Record
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.length_score import LengthScore
from ftrun.select.lengths import length_score, text_length


def rows(*prompts: str) -> Rows:
    made = [(Message("user", prompt), Message("assistant", "yes")) for prompt in prompts]
    return Rows([Record(id, "sft", messages) for id, messages in enumerate(made)])


def test_only_prompts_with_one_length_are_answered(bundle, context):
    heldout = rows("write 5 words", "write", "5 words or 6 words", "write 7 words", "write 8 words")
    found = LengthScore(rows=2, max_new_tokens=12).evaluate(bundle, context(heldout=heldout))
    assert [(row["id"], row["required"]) for row in found.predictions] == [(0, 5), (3, 7)]
    for row in found.predictions:
        assert row["length"] == text_length(row["output"])
        assert row["score"] == length_score(row["length"], row["required"])
    scores = [row["score"] for row in found.predictions]
    assert found.metrics["length_score"].value == pytest.approx(np.mean(scores))
    assert found.metrics["length_score"].n == 2


def test_answers_do_not_depend_on_the_batch(bundle, context):
    heldout = rows(*(f"write {i} words on the quick brown fox" for i in range(3, 8)))
    made = [
        LengthScore(max_new_tokens=8, batch_size=size).evaluate(bundle, context(heldout=heldout)).predictions
        for size in (1, 5)
    ]
    assert made[0] == made[1]


def test_nothing_to_answer_is_refused(bundle, context):
    with pytest.raises(ConfigError, match="none of 1 held-out prompts"):
        LengthScore().evaluate(bundle, context(heldout=rows("write")))
    with pytest.raises(ConfigError, match="none of 0"):
        LengthScore().evaluate(bundle, context())
    with pytest.raises(DataError, match="no room"):
        LengthScore(max_new_tokens=5000).evaluate(bundle, context(heldout=rows("write 5 words")))
