"""Where the pauses of pause-tuning stand."""

from __future__ import annotations

import json

import numpy as np
import pytest

import ftrun
from ftrun.data.records import Message, Record
from ftrun.data.render import Renderer
from ftrun.errors import ConfigError, DataError
from ftrun.tokens.policies.pause_tuning import PauseTuning

ESSAY = "First part. [1]\n\nSecond [note 2] part.\n\nThird. [3]"
SYSTEM = Message("system", "rule [0]")


def row(text: str = ESSAY, answer: str = "see [1]", id: int = 0, **fields: str) -> Record:
    return Record(id, "sft", messages=(SYSTEM, Message("user", text), Message("assistant", answer)), fields=fields)


def edited(policy: PauseTuning, record: Record, ctx) -> list[str]:
    return [turn["content"] for line in policy.edit([record], ctx) for turn in line["messages"]]


@pytest.mark.parametrize(("after", "ends"), [(r"\]", 3), (r"\n\n+", 2), (r"(?<=\.)(?=\s)", 3), (None, 0)])
def test_a_pause_follows_every_segment(after, ends, context):
    system, asked, answer = edited(PauseTuning(after=after), row(), context())
    assert asked.count(" <PAUSE> ") == ends
    assert asked.replace(" <PAUSE> ", "") == ESSAY
    assert (system, answer) == (SYSTEM.content, "see [1]")


def test_brackets_by_default(context):
    _, asked, _ = edited(PauseTuning(), row("a [1] b [2]"), context())
    assert asked == "a [1] <PAUSE>  b [2] <PAUSE> "


def test_no_pause_is_a_target(context, bundle):
    policy = PauseTuning()
    record = Record(0, "sft", messages=tuple(policy.with_pauses(row())))
    [sequence] = Renderer(bundle.tokenizer).sequences(record)
    trained = bundle.tokenizer.decode(sequence.input_ids[np.asarray(sequence.loss_weight) > 0])
    assert "PAUSE" not in trained and "see [1]" in trained
    assert bundle.tokenizer.decode(sequence.input_ids).count("<PAUSE>") == 3


def test_the_context_column_alone(context):
    policy = PauseTuning(context="input")
    _, asked, _ = edited(policy, row(f"Use [x] only.\n\n{ESSAY}", input=ESSAY), context())
    assert asked.startswith("Use [x] only.") and asked.count("<PAUSE>") == 3
    for record in (row(), row(input="something else")):
        with pytest.raises(DataError, match='no text in the column "input"'):
            edited(policy, record, context())


def test_generation_sees_the_prompt_of_training(context):
    policy, record = PauseTuning(), row()
    prompt = Record(0, "prompts", messages=record.messages[:-1])
    asked = policy.edit_prompt(prompt)
    assert [m.content for m in asked.messages] == edited(policy, record, context())[:-1]
    assert policy.edit_prompt(asked) == asked


def test_an_untrained_model_can_be_asked_with_pauses_and_a_line_that_explains_them(tiny_dir, tmp_path):
    """The two baselines in the recipe's header."""
    file = tmp_path / "essays.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"a [1] b {n}", "output": "b"}) + "\n" for n in range(3)))
    more = [f"model.path={tiny_dir}", f"data.path={file}", f"out={tmp_path / 'run'}", "eval=[heldout]"]
    ftrun.run("eval", overrides=["recipe=pause_tuning", *more, "data.system=Stop at each <PAUSE>."])
    (asked,) = (tmp_path / "run/selection").glob("*.jsonl")
    for n, line in enumerate(asked.read_text().splitlines()):
        contents = [turn["content"] for turn in json.loads(line)["messages"]]
        assert contents == ["Stop at each <PAUSE>.", f"a [1] <PAUSE>  b {n}", "b"]


def test_rows_with_pauses_of_their_own_and_rows_without_any_are_said(context):
    ctx = context()
    _, asked, _ = edited(PauseTuning(), row("a [1] <PAUSE> b"), ctx)
    assert asked == "a [1] <PAUSE> b" and not ctx.report.warnings
    edited(PauseTuning(), row("plain"), ctx)
    assert "1 of 1 rows get no pause" in ctx.report.warnings[0]


@pytest.mark.parametrize("knobs", [{"pause": "  "}, {"after": "("}, {"after": "a*"}, {"after": ""}])
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        PauseTuning(**knobs)
