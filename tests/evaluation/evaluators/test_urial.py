"""Answers after constant examples: cut at the next query, and the same however they are batched."""

from __future__ import annotations

import pytest
import torch
from made_up_rows import Rows
from transformers import RepetitionPenaltyLogitsProcessor

from ftrun.data.records import Message, Record
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.evaluators.urial import EXAMPLES, FENCE, STOPS, OwnPenalty, SaysOneOf, Urial, cut, prompt_text


@pytest.fixture
def rows() -> Rows:
    made = ["fox " * (1 + 3 * (id % 3)) + str(id) for id in range(5)]
    return Rows(
        [Record(id, "sft", (Message("user", text), Message("assistant", "yes"))) for id, text in enumerate(made)]
    )


@pytest.fixture
def roomy(bundle, monkeypatch):
    """The prompt is long in bytes; a short one keeps to the tiny model's context."""
    monkeypatch.setattr("ftrun.evaluation.evaluators.urial.SYSTEM", "answer")
    return bundle


def test_the_prompt_is_constant_and_ends_with_an_open_fence():
    text = prompt_text([Message("user", "why?")], 3)
    assert text.count("# Query:\n") == 4 and text.count(FENCE) == 7
    assert text.endswith("# Query:\nwhy?\n\n# Answer:\n```\n")
    assert "houseplants" not in prompt_text([Message("user", "why?")], 0)
    assert all(FENCE not in answer and not any(stop in answer for stop in STOPS) for _, answer in EXAMPLES)


def test_earlier_turns_stand_as_queries_and_answers():
    turns = [("system", "be brief"), ("user", "why?"), ("assistant", "so"), ("user", "and?")]
    text = prompt_text([Message(role, said) for role, said in turns], 0)  # type: ignore[arg-type]
    assert text.endswith(
        "\n\n# Query:\nbe brief\n\nwhy?\n\n# Answer:\n```\nso\n```\n\n# Query:\nand?\n\n# Answer:\n```\n"
    )
    asked, answer = EXAMPLES[0]
    assert f"\n\n# Query:\n{asked}\n\n# Answer:\n```\n{answer}\n```\n\n# Query:\n" in prompt_text([], 2)


def test_an_answer_ends_where_the_next_query_begins():
    assert cut("yes\n```\n\n# Query:\nwhat") == ("yes\n```\n\n", True)
    assert cut("a # User b # Query") == ("a ", True)
    assert cut("no end") == ("no end", False)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_changes_nothing(roomy, context, rows, temperature):
    ctx = context(heldout=rows)
    made = [
        Urial(examples=0, batch_size=size, max_new_tokens=10, temperature=temperature).evaluate(roomy, ctx)
        for size in (1, 4)
    ]
    assert made[0] == made[1]
    assert len({row["output"] for row in made[0].predictions}) > 1
    assert not any(stop in row["output"] for row in made[0].predictions for stop in STOPS)


def test_generation_stops_at_the_next_query_and_the_fence_comes_off(roomy, context, rows, monkeypatch):
    """A head that says a fixed text, whatever the prompt."""
    said = roomy.tokenizer("yes\n```\n\n# Query: more and more").input_ids
    starts = {}

    def head(_module, _inputs, logits):
        at = starts.setdefault("step", 0)
        starts["step"] += 1
        forced = torch.full_like(logits, -1e4)
        forced[..., said[min(at, len(said) - 1)]] = 1e4
        return forced

    handle = roomy.model.lm_head.register_forward_hook(head)
    try:
        found = Urial(examples=0, rows=1, max_new_tokens=40, repetition_penalty=1.0).evaluate(
            roomy, context(heldout=rows)
        )
    finally:
        handle.remove()
    assert found.predictions[0]["output"] == "yes" and found.metrics["accuracy"].value == 1
    assert found.metrics["finished"].value == 1
    assert starts["step"] < len(said), "nothing is written after the stop string"


def test_the_penalty_is_that_of_transformers_without_the_padding():
    ids = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 3]])
    scores = torch.randn(2, 9)
    found = OwnPenalty(1.3, [2, 0])(ids, scores)
    expected = [
        RepetitionPenaltyLogitsProcessor(1.3)(ids[row : row + 1, padding:], scores[row : row + 1].clone())[0]
        for row, padding in ((0, 2), (1, 0))
    ]
    torch.testing.assert_close(found, torch.stack(expected))


def test_strings_are_found_across_tokens(bundle):
    ids = torch.tensor([bundle.tokenizer("x # Query").input_ids, bundle.tokenizer("x # Quer!").input_ids])
    assert SaysOneOf(STOPS, bundle.tokenizer, 0)(ids, ids).tolist() == [True, False]
    assert SaysOneOf(STOPS, bundle.tokenizer, 5)(ids, ids).tolist() == [False, False]


def test_processes_agree(roomy, context, rows, alone):
    knobs = {"examples": 0, "batch_size": 2, "max_new_tokens": 4}
    reference = Urial(**knobs).evaluate(roomy, context(heldout=rows))
    shares = []
    for rank in range(2):
        team = alone(rank, 2)
        Urial(**knobs).evaluate(roomy, context(team, heldout=rows))
        shares.append(team.given[0])
    assert Urial(**knobs).evaluate(roomy, context(alone(1, 2, gathered=[shares]), heldout=rows)) == reference


def test_bad_knobs_and_rows_are_refused(bundle, context, rows):
    with pytest.raises(ConfigError, match="3 examples"):
        Urial(examples=4)
    with pytest.raises(ConfigError, match="at least 1"):
        Urial(batch_size=0)
    with pytest.raises(ConfigError, match="penalty"):
        Urial(repetition_penalty=0)
    with pytest.raises(ConfigError, match="eval=urial has no rows"):
        Urial().evaluate(bundle, context())
    with pytest.raises(DataError, match="with its examples"):
        Urial().evaluate(bundle, context(heldout=rows))
