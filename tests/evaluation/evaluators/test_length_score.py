"""The length of generated answers against the length that their prompt states."""

from __future__ import annotations

import numpy as np
import pytest
from made_up_rows import Rows

from ftrun.data.records import Message, Record
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.evaluators.length_score import LengthScore
from ftrun.select.scoring.lengths import length_score, text_length


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


def test_rows_that_the_preflight_dropped_are_not_answered(bundle, context):
    heldout = rows("write 5 words", "write 6 words", "write 7 words")
    tokens = TokenTable.from_sequences(
        [Sequence(np.arange(3, dtype=np.int32), np.ones(3, np.float32), id) for id in (0, 2)]
    )
    found = LengthScore(max_new_tokens=2).evaluate(bundle, context(heldout=heldout, heldout_tokens=tokens))
    assert [row["id"] for row in found.predictions] == [0, 2]


def test_answers_do_not_depend_on_the_batch(bundle, context):
    heldout = rows(*(f"write {i} words on the quick brown fox" for i in range(3, 8)))
    made = [
        LengthScore(max_new_tokens=8, batch_size=size).evaluate(bundle, context(heldout=heldout)).predictions
        for size in (1, 5)
    ]
    assert made[0] == made[1]


def test_two_processes_give_what_one_does(bundle, context, alone):
    heldout = rows(*(f"write {i} words on the quick brown fox" for i in range(3, 8)))
    scorer = LengthScore(max_new_tokens=6, batch_size=2)
    reference, shares = scorer.evaluate(bundle, context(heldout=heldout)), []
    for rank in range(2):
        team = alone(rank, 2)
        scorer.evaluate(bundle, context(team, heldout=heldout))
        shares.append(team.given[0])
    assert scorer.evaluate(bundle, context(alone(1, 2, gathered=[shares]), heldout=heldout)) == reference


def test_nothing_to_answer_is_refused(bundle, context):
    with pytest.raises(ConfigError, match="none of 1 held-out prompts"):
        LengthScore().evaluate(bundle, context(heldout=rows("write")))
    with pytest.raises(ConfigError, match="none of 0"):
        LengthScore().evaluate(bundle, context())
    with pytest.raises(DataError, match="no room"):
        LengthScore(max_new_tokens=5000).evaluate(bundle, context(heldout=rows("write 5 words")))


@pytest.mark.parametrize(
    "knobs",
    [{"rows": 0}, {"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -1.0}, {"patterns": ["("]}],
    ids=repr,
)
def test_impossible_knobs_are_refused(knobs):
    with pytest.raises(ConfigError) as error:
        LengthScore(**knobs)
    assert error.value.where.startswith(f"eval.length_score.{next(iter(knobs))}=")
