"""What LookAhead Tuning shows of an answer."""

from __future__ import annotations

import pytest

import ftrun
from ftrun.data.records import Message, Record
from ftrun.errors import ConfigError
from ftrun.tokens.policies.lookahead_tuning import LookaheadTuning, beginning

CONNECTOR = " The answer begins with: "
ANSWERS = [
    "answers: yes no yes no yes no yes no 12",
    "naïve café, 日本語 👩‍👩‍👧 text",
    "x",
    " leading blank and\nlines\n\nof text",
    "\N{SNOWMAN}" * 5,
]


def row(*contents: str, id: int = 0) -> Record:
    roles = ["user", "assistant"] * len(contents)
    messages = tuple(Message(role, text) for role, text in zip(roles, contents, strict=False))  # type: ignore[arg-type]
    return Record(id, "sft", messages=messages)


def edited(policy: LookaheadTuning, records: list[Record], ctx) -> list[list[str]]:
    return [[turn["content"] for turn in line["messages"]] for line in policy.edit(records, ctx)]


@pytest.mark.parametrize("answer", ANSWERS)
def test_real_shows_the_first_tokens_and_keeps_the_answer(answer, context, bundle):
    [[asked, kept]] = edited(LookaheadTuning(), [row("what is it", answer)], context())
    assert kept == answer
    assert asked.startswith("what is it" + CONNECTOR)
    shown = asked.removeprefix("what is it" + CONNECTOR)
    assert answer.startswith(shown) and shown
    ids = bundle.tokenizer(answer, add_special_tokens=False)["input_ids"]
    plain = bundle.tokenizer.decode(ids[:6])
    if "\N{REPLACEMENT CHARACTER}" not in plain:
        assert shown == plain
    else:  # six tokens end within a character, which is shown whole
        assert shown[:-1] == plain.rstrip("\N{REPLACEMENT CHARACTER}")[: len(shown) - 1]


def test_short_answers_are_shown_whole(context):
    [[asked, _]] = edited(LookaheadTuning(m=50), [row("a", "the dog")], context())
    assert asked == f"a{CONNECTOR}the dog"


def test_no_tokens_is_no_edit(context):
    ctx = context()
    assert edited(LookaheadTuning(m=0), [row("a", "b")], ctx) == [["a", "b"]]
    assert not ctx.report.warnings


def test_virtual_shows_what_the_answer_then_begins_with(context):
    policy = LookaheadTuning(mode="virtual", preview="Well. ")
    assert edited(policy, [row("a", "b")], context()) == [[f"a{CONNECTOR}Well. ", "Well. b"]]


def test_every_trained_turn_is_shown(context):
    ctx = context()
    conversation = row("a", "the dog", "b", "the fox")
    assert edited(LookaheadTuning(m=9), [conversation], ctx) == [
        [f"a{CONNECTOR}the dog", "the dog", f"b{CONNECTOR}the fox", "the fox"]
    ]
    ctx.settings.data.train_on = "last_response"
    assert edited(LookaheadTuning(m=9), [conversation], ctx)[0][:2] == ["a", "the dog"]


def test_with_the_last_response_trained_no_other_is_shown(context):
    ctx = context()
    ctx.settings.data.train_on = "last_response"
    turns = [("user", "a"), ("assistant", "f()"), ("tool", "7"), ("assistant", "seven")]
    [line] = LookaheadTuning().edit([Record(0, "sft", messages=tuple(Message(*turn) for turn in turns))], ctx)
    assert [(turn["role"], turn["content"]) for turn in line["messages"]] == turns
    assert "1 rows have no trained answer" in ctx.report.warnings[0]


def test_held_out_rows_are_not_edited(tiny_dir, rows_file, tmp_path):
    out = tmp_path / "run"
    words = ["recipe=lookahead_tuning", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", "eval=[]"]
    ftrun.run("train", overrides=[*words, "train.max_steps=1", "train.batch_size=4", "data.max_length=256"])
    assert [file.name for file in (out / "selection").glob("*.jsonl")] == ["edited.jsonl"]


def test_an_answer_to_a_tool_is_counted_and_left(context):
    ctx = context()
    turns = (Message("user", "a"), Message("tool", "7"), Message("assistant", "seven"))
    [line] = LookaheadTuning().edit([Record(0, "sft", messages=turns)], ctx)
    assert [turn["content"] for turn in line["messages"]] == ["a", "7", "seven"]
    assert "1 rows have no trained answer" in ctx.report.warnings[0]


def test_a_slow_tokenizer_shows_a_prefix_too():
    class Slow:
        is_fast = False

        def __call__(self, text, **_):
            return {"input_ids": list(text.encode())}

        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    assert beginning("aé" * 9, 2, Slow()) == "a"
    assert beginning("aé" * 9, 3, Slow()) == "aé"


@pytest.mark.parametrize("knobs", [{"m": -1}, {"mode": "virtual", "preview": " "}])
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        LookaheadTuning(**knobs)
