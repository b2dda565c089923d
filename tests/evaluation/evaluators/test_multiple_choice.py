"""Multiple choice against the model's own logits."""

from __future__ import annotations

import json

import pytest
import torch

from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.evaluators.multiple_choice import MultipleChoice

ROWS = [
    {"question": "what is 2 plus 2", "choices": ["yes", "the lazy dog 4", "no no no", "9"], "answer": 1},
    {"question": "the quick brown", "choices": ["fox jumps over", "7"], "answer": "A"},
    {"question": "is a dog lazy", "choices": ["no", "yes and then", "over"], "answer": "yes and then"},
    {"question": "over", "choices": ["3", "2", "1"], "answer": "(c)"},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def by_hand(bundle, question: str, choice: str) -> float:
    """Sum of the log-probabilities of the choice's tokens, from whole logits."""
    prompt = bundle.tokenizer(f"Question: {question}\nAnswer:").input_ids
    whole = bundle.tokenizer(f"Question: {question}\nAnswer: {choice}").input_ids
    assert whole[: len(prompt)] == prompt
    with torch.no_grad():
        logs = bundle.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(logs[at - 1, whole[at]]) for at in range(len(prompt), len(whole)))


def test_equals_a_computation_by_hand(bundle, context, file):
    found = MultipleChoice(path=file).evaluate(bundle, context())
    gold = [1, 0, 1, 2]
    right = right_norm = 0
    for row, answer, prediction in zip(ROWS, gold, found.predictions, strict=True):
        scores = [by_hand(bundle, row["question"], choice) for choice in row["choices"]]
        assert prediction["log_likelihoods"] == pytest.approx(scores, abs=1e-4)
        best = max(range(len(scores)), key=lambda index: scores[index])
        best_norm = max(range(len(scores)), key=lambda index: scores[index] / len(row["choices"][index]))
        assert prediction["output"] == row["choices"][best]
        assert prediction["gold"] == row["choices"][answer]
        right += best == answer
        right_norm += best_norm == answer
    assert found.metrics["acc"].value == right / 4
    assert found.metrics["acc_norm"].value == right_norm / 4
    assert found.metrics["acc"].n == 4


def test_batch_size_changes_nothing(bundle, context, file):
    one, many = (MultipleChoice(path=file, batch_tokens=size).evaluate(bundle, context()) for size in (1, 4096))
    for a, b in zip(one.predictions, many.predictions, strict=True):
        assert a["log_likelihoods"] == pytest.approx(b["log_likelihoods"], abs=1e-5)
        assert a["output"] == b["output"]


def test_limit(bundle, context, file):
    assert MultipleChoice(path=file, limit=2).evaluate(bundle, context()).metrics["acc"].n == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "choices": ["x", "y"]}, '"answer" is missing'),
        ({"question": "a", "choices": ["x"], "answer": 0}, "two or more"),
        ({"question": "a", "choices": ["x", "y"], "answer": 2}, "none of the 2 choices"),
        ({"question": "a", "choices": ["x", "y"], "answer": "E"}, "none of the 2 choices"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, message):
    path = tmp_path / "wrong.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        MultipleChoice(path=str(path)).questions()
    assert caught.value.where == f"{path}:2"


def test_a_choice_wins_over_a_letter(tmp_path):
    path = tmp_path / "letters.jsonl"
    path.write_text(json.dumps({"question": "which letter follows A", "choices": ["A", "C", "B"], "answer": "B"}))
    assert MultipleChoice(path=str(path)).questions()[0].answer == 2


def test_no_path_and_no_question_in_the_prompt_are_refused():
    with pytest.raises(ConfigError, match="no questions"):
        MultipleChoice().questions()
    with pytest.raises(ConfigError, match="does not hold the question"):
        MultipleChoice(prompt="Answer:")
