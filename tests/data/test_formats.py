"""Each layout is recognised by its keys and becomes the right Record; rows that cannot be trained are refused."""

from __future__ import annotations

import pytest

from ftrun.data.formats import layout_of
from ftrun.data.records import Message
from ftrun.errors import ConfigError, DataError


def U(text):
    return Message("user", text)


def A(text):
    return Message("assistant", text)


def S(text):
    return Message("system", text)


def record(*rows, setting="auto", columns=None, system=None):
    """The last of these rows, read in the layout of the first."""
    layout = layout_of(rows[0], "rows.jsonl:1", setting, columns or {}, system)
    for number, row in enumerate(rows):
        result = layout.record(number, row, f"rows.jsonl:{number + 1}")
    return layout.with_system(result)


def turn(role, content):
    return {"role": role, "content": content}


TURNS = [turn("system", "s"), turn("user", "q"), turn("assistant", "a"), turn("user", "q2"), turn("assistant", "a2")]
SFT = {
    "alpaca": ({"instruction": "q", "input": "i", "output": "a"}, (U("q\n\ni"), A("a"))),
    "alpaca without input": ({"instruction": "q", "input": "", "output": "a"}, (U("q"), A("a"))),
    "alpaca with null input": ({"instruction": "q", "input": None, "output": "a", "source": "x"}, (U("q"), A("a"))),
    "alpaca with system": ({"system": "s", "instruction": "q", "output": "a"}, (S("s"), U("q"), A("a"))),
    "completion": ({"prompt": "q", "completion": "a"}, (U("q"), A("a"))),
    "response": ({"prompt": "q", "response": "a"}, (U("q"), A("a"))),
    "instruction, context, response": (
        {"instruction": "q", "context": "c", "response": "a", "category": "x"},
        (U("q\n\nc"), A("a")),
    ),
    "turns as prompt and completion": (
        {"prompt": TURNS[:2], "completion": [turn("assistant", "a")]},
        (S("s"), U("q"), A("a")),
    ),
    "messages": ({"messages": TURNS}, (S("s"), U("q"), A("a"), U("q2"), A("a2"))),
    "messages in parts": (
        {"messages": [turn("user", [{"type": "text", "text": "q"}]), turn("assistant", "a")]},
        (U("q"), A("a")),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        (S("s"), U("q"), A("a")),
    ),
}


@pytest.mark.parametrize(("row", "messages"), SFT.values(), ids=SFT)
def test_conversations(row, messages):
    result = record(row)
    assert (result.kind, result.messages, result.fields) == ("sft", messages, row)
    assert result.response == messages[-1].content and result.prompt == messages[:-1]


def test_gold_answer_and_verifier_are_kept():
    result = record({"instruction": "q", "output": "a", "answer": "4", "verifier": "gsm_symbolic"})
    assert (result.kind, result.answer, result.verifier) == ("sft", "4", "gsm_symbolic")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]},
        {
            "chosen": [turn("user", "q"), turn("assistant", "good")],
            "rejected": [turn("user", "q"), turn("assistant", "bad")],
        },
        {
            "prompt": "q",
            "messages": TURNS,
            "chosen": [turn("user", "q"), turn("assistant", "good")],
            "rejected": [turn("user", "q"), turn("assistant", "bad")],
        },
    ],
)
def test_preferences(row):
    result = record(row)
    assert (result.kind, result.messages, result.chosen, result.rejected) == (
        "pairs",
        (U("q"),),
        (A("good"),),
        (A("bad"),),
    )


def test_pairs_may_share_several_turns():
    sides = {key: [*TURNS[:4], turn("assistant", key)] for key in ("chosen", "rejected")}
    result = record(sides)
    assert len(result.messages) == 4 and result.chosen == (A("chosen"),)


@pytest.mark.parametrize(("label", "expected"), [(True, 1), (False, 0), (1, 1), ("false", 0), ("True", 1)])
def test_binary(label, expected):
    result = record({"prompt": "q", "completion": "a", "label": label})
    assert (result.kind, result.messages, result.label) == ("binary", (U("q"), A("a")), expected)


def test_other_kinds():
    text = record({"text": "some text", "url": "x"})
    assert (text.kind, text.text) == ("text", "some text")
    labelled = record({"text": "some text", "text_pair": "more", "label": 0})
    assert (labelled.kind, labelled.text, labelled.text_pair, labelled.label) == ("labels", "some text", "more", 0)
    for key in ("prompt", "instruction"):
        prompt = record({key: "q", "answer": "4"})
        assert (prompt.kind, prompt.messages, prompt.answer) == ("prompts", (U("q"),), "4")


def test_columns_are_renamed_first():
    row = {"question": "q", "answer": "a"}
    assert record(row, columns={"instruction": "question", "output": "answer"}).messages == (U("q"), A("a"))
    assert record(row, columns={"instruction": "question", "output": "answer"}).answer is None
    assert record(row, columns={"prompt": "question"}).kind == "prompts"
    assert record({"instruction": "q", "output": "worse", "better": "a"}, columns={"output": "better"}).response == "a"
    with pytest.raises(ConfigError, match="outptu") as caught:
        record(row, columns={"outptu": "answer"})
    assert "output" in caught.value.todo
    with pytest.raises(ConfigError, match="qestion") as caught:
        record(row, columns={"prompt": "qestion"})
    assert "question" in caught.value.todo


def test_format_can_be_forced():
    assert record({"text": "t", "label": "x"}, setting="text").kind == "text"
    assert (
        record(
            {"instruction": "q", "output": "a"}, {"instruction": "q", "output": "a", "messages": []}, setting="alpaca"
        ).response
        == "a"
    )
    with pytest.raises(DataError, match="no output"):
        record({"prompt": "q", "completion": "a"}, setting="alpaca")


def test_outputs_of_functions_are_those_of_tools():
    """`function` is the older name of the role."""
    turns = [turn("user", "q"), turn("assistant", "f(1)"), turn("function", "2"), turn("assistant", "a")]
    assert [message.role for message in record({"messages": turns}).messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


def test_default_system_prompt():
    assert record({"instruction": "q", "output": "a"}, system="be kind").messages[0] == S("be kind")
    assert record({"messages": TURNS}, system="be kind").messages[0] == S("s")
    assert record({"text": "t"}, system="be kind").messages == ()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "q", "output": ""}, "empty output"),
        ({"instruction": "q", "output": " \n"}, "empty output"),
        ({"instruction": "q", "output": None}, "no output"),
        ({"instruction": "q", "input": "i"}, "no output"),
        ({"instruction": "", "output": "a"}, "empty instruction"),
        ({"instruction": "q", "output": float("nan")}, "no output"),
        ({"instruction": "q", "output": True}, "bool as output"),
        ({"instruction": "q", "output": float("inf")}, "float as output"),
        ({"instruction": "q", "output": "\ud800"}, "surrogate"),
        ({"prompt": "q", "completion": "a"}, "is prompt_completion, but the rows before it are alpaca"),
        ({"messages": TURNS}, "is messages"),
        ({"other": 1}, "no instruction and no output"),
        ({}, "no instruction"),
    ],
)
def test_bad_row_among_alpaca_rows(row, words):
    good = {"instruction": "q", "output": "a"}
    with pytest.raises(DataError, match=words) as caught:
        record(good, good, row)
    assert caught.value.what.startswith("row 2 of rows.jsonl ") and caught.value.where == "rows.jsonl:3"


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "empty messages"),
        ("text", "no list of turns"),
        (["text"], "without role"),
        ([turn("user", "q")], "ends with a user turn"),
        ([turn("user", "q"), turn("robot", "a")], 'unknown role "robot"'),
        ([turn("user", "q"), turn("assistant", "")], "empty turn 2"),
        ([turn("user", "q"), turn("assistant", None)], "empty turn 2"),
        ([turn("user", "q"), {"role": "assistant", "content": None, "tool_calls": [1]}], "tool calls without a name"),
        ([turn("user", [{"type": "image"}]), turn("assistant", "a")], "something else than text"),
        ([turn("assistant", "a")], "only the assistant"),
    ],
)
def test_bad_conversations(turns, words):
    with pytest.raises(DataError, match=words) as caught:
        record({"messages": TURNS}, {"messages": turns})
    assert caught.value.where == "rows.jsonl:2"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty rejected"),
        ({"prompt": "q", "chosen": [turn("assistant", "a")], "rejected": "b"}, "on one side"),
        (
            {
                "chosen": [turn("user", "q"), turn("assistant", "a")],
                "rejected": [turn("user", "p"), turn("assistant", "b")],
            },
            "do not share",
        ),
        (
            {
                "prompt": "p",
                "chosen": [turn("user", "q"), turn("assistant", "a")],
                "rejected": [turn("user", "q"), turn("assistant", "b")],
            },
            "differs",
        ),
        ({"prompt": "q", "completion": "a", "label": 0.5}, "neither true nor false"),
        ({"text": "t", "label": ""}, "as label"),
        ({"text": "t", "label": [1]}, "as label"),
        ({"text": " "}, "empty text"),
        ({"question": "q", "answer": "4"}, "say which"),
        ({"instruction": "q"}, "no response"),
        ({"a": 1, "b": 2}, "keys: a, b"),
    ],
)
def test_bad_first_rows(row, words):
    with pytest.raises(DataError, match=words):
        record(row)
