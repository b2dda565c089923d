"""Calls of tools in texts, the tools of a conversation, and the reward of a call."""

from __future__ import annotations

import json

import pytest

from ftrun.data.calls import call_reward, read_call, tools_of
from ftrun.data.records import Message, Record


def parts(text: str) -> tuple[str, dict, str, list[str]]:
    """Name, arguments, the text from the name on, and the text up to the end of each value."""
    call = read_call(text)
    assert call is not None
    return call.name, call.arguments, text[call.name_start :], [text[: last + 1] for last in call.last]


@pytest.mark.parametrize(
    ("text", "name", "arguments", "values"),
    [
        ("get_news(topic='sun, (hot)', days=3)", "get_news", {"topic": "sun, (hot)", "days": 3}, ["(hot)", "=3"]),
        ("f(a=true, b=[1, 'x'], c=null)", "f", {"a": True, "b": [1, "x"], "c": None}, ["=true", "'x']", "=null"]),
        ("f(\n  a='é',\n  b='ü'\n)", "f", {"a": "é", "b": "ü"}, ["'é", "'ü"]),
        ("[look.up-it(q='x')]", "look.up-it", {"q": "x"}, ["='x"]),
        ("f()", "f", {}, []),
        ('So: {"name": "f", "arguments": {"a": "x y", "b": 2}} it is', "f", {"a": "x y", "b": 2}, ["x y", ": 2"]),
        ('<tool_call>{"arguments": {"name": "b"}, "name": "f"}</tool_call>', "f", {"name": "b"}, ['"b']),
    ],
)
def test_calls_are_read_with_their_places(text, name, arguments, values):
    found, given, rest, upto = parts(text)
    assert (found, given) == (name, arguments)
    assert rest.startswith(name)
    assert [begun.endswith(value) for begun, value in zip(upto, values, strict=True)] == [True] * len(values)


@pytest.mark.parametrize(
    "text", ["", "I read the file(s).", "f(1)", "f(a=", "{", '{"name": "f"}', "print the dog", "f(**x)"]
)
def test_other_texts_hold_no_call(text):
    assert read_call(text) is None


DESCRIBED = {"name": "f", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}}}


@pytest.mark.parametrize(
    ("fields", "system"),
    [
        ({"tools": [{"type": "function", "function": DESCRIBED}]}, ""),
        ({"tools": json.dumps([DESCRIBED])}, ""),
        ({}, f"Use <tools>{json.dumps(DESCRIBED)}</tools> well."),
        ({}, "Function:\ndef f(a: str, b: int = None):\n    pass"),
    ],
)
def test_tools_are_found_where_they_are_listed(fields, system):
    assert tools_of(Record(0, "sft", (Message("system", system),), fields=fields)) == {"f": ["a", "b"]}


def test_names_alone_are_tools_too():
    assert tools_of(Record(0, "sft", fields={"tools": ["f", "g"]})) == {"f": None, "g": None}
    assert tools_of(Record(0, "sft", (Message("system", "be kind"),))) == {}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("no call", -2),
        ("h(a=1)", -2),
        ("g(a=1)", -1.5),
        ("f(x=1, c=1, b=1)", -1.8),  # hallucinated, extra, missing
        ("f(x=1, c=1, a=1, b=2)", -1.3),
        ("f(x=1, a=1)", -1.3),
        ("f(a=1, c=1)", -1.0),
        ("f(a=1, b=2, x=1)", -0.8),
        ("f(a=1, b=2, c=1)", -0.5),
        ("f(a=1)", -0.5),
        ("f(a=1, b=3)", -0.25),
        ("f(b=2, a=1)", 1),
    ],
)
def test_the_table_of_rewards(text, reward):
    gold = read_call("f(a=1, b=2)")
    assert gold is not None
    assert call_reward(text, gold, {"f": ["a", "b", "c"], "g": ["a"]}) == reward


def test_names_cannot_be_unknown_to_a_tool_without_parameters():
    gold = read_call("f(a=1)")
    assert gold is not None
    assert call_reward("f(a=1, z=1)", gold, {"f": None}) == -0.25
    assert call_reward("f(a=1)", gold, {}) == 1
