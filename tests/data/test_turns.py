"""Every way in which people write a turn becomes the one message that it means, or is refused by name."""

from __future__ import annotations

import json

import pytest

from ftrun.data.formats import layout_of
from ftrun.data.meanings import ROW, TURN
from ftrun.data.records import Message, answers
from ftrun.data.turns import messages_of
from ftrun.errors import ConfigError, DataError

U, A, S, T = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system", "tool"))


def record(*rows, setting="auto", ignored=()):
    """The last of these rows, read in the layout of the first."""
    layout = layout_of(rows[0], "rows.jsonl:1", setting, {}, None, ignored)
    return [layout.record(number, row, f"rows.jsonl:{number + 1}") for number, row in enumerate(rows)][-1]


def chat(*answers_keys, **row):
    """A conversation whose answers have these further keys."""
    turns = []
    for number, keys in enumerate(answers_keys):
        turns += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"} | keys]
    return {"messages": turns} | row


def weights(row, **how):
    return [message.weight for message in record(row, **how).messages if message.role == "assistant"]


# ---- keys and roles ----

TURNS = [("system", "s"), ("user", "q"), ("assistant", "a"), ("system", "s2"), ("user", "q2"), ("assistant", "a2")]


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value"), ("from", "content")])
def test_key_names_may_be_mixed(column, role, content):
    """A system turn may come later too: the template decides."""
    result = record({column: [{role: who, content: what} for who, what in TURNS]})
    assert result.messages == tuple(Message(who, what) for who, what in TURNS)
    assert record({column: json.dumps([{role: who, content: what} for who, what in TURNS])}).messages == result.messages


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *((role, "system") for role in ("developer", "SYSTEM", "System")),
        *((role, "user") for role in ("human", "Human", "USER", "prompter")),
        *((role, "assistant") for role in ("gpt", "model", "chatgpt", "bot", "Assistant", "GPT")),
        *((role, "tool") for role in ("observation", "function", "tool_response", "Tool")),
    ],
)
def test_roles_in_other_words(theirs, ours):
    turns = [{"role": "user", "content": "q"}, {"role": theirs, "content": "x"}, {"role": "assistant", "content": "a"}]
    assert record({"messages": turns}).messages[1] == Message(ours, "x")


def test_a_greeting_is_context_with_and_without_a_system_turn():
    turns = [A("hello"), U("q"), A("a")]
    assert answers(turns) == [2] and answers([S("s"), *turns]) == [3]
    assert answers([T("sun"), A("a")]) == [1]


# ---- weights ----


@pytest.mark.parametrize(
    ("no", "yes"),
    [
        ({"weight": 0}, {"weight": 1}),
        ({"weight": 0.0}, {"weight": 1.0}),
        ({"train": False}, {"train": True}),
        ({"training": False}, {"training": True}),
        ({"loss": False}, {"loss": True}),
        ({"loss": 0}, {"loss": 1}),
        ({"loss_scale": 0}, {"loss_scale": 1}),
        ({"mask": True}, {"mask": False}),
        ({"masked": 1}, {"masked": 0}),
        ({"train": "false"}, {"train": "True"}),
        ({"train": False, "weight": 0}, {"train": True, "weight": None}),
    ],
)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_turns_say_whether_they_are_trained(no, yes, column):
    assert weights({column: chat(no, yes, {})["messages"]}) == [0, 1, None]


def test_weights_between_and_of_whole_rows():
    assert weights(chat({"weight": 0.25}, {})) == [0.25, None]
    assert weights(chat({"weight": 0.5}, {}, weight=0.5)) == [0.25, 0.5]
    assert weights({"instruction": "q", "output": "a", "train": False}) == [0]
    assert weights({"prompt": "q", "completion": "a", "loss": 2.5}) == [None]  # a measurement
    assert weights(chat({}, weight=0), ignored=("weight",)) == [None]
    pair = record({"prompt": "q", "chosen": "a", "rejected": "b", "weight": 0})
    assert pair.chosen[0].weight == pair.rejected[0].weight == 0


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (chat({"weight": -1}), "weight=-1 in turn 2"),
        (chat({"weight": "high"}), "weight='high'"),
        (chat({"weight": 1, "train": False}), "one contradicts"),
        (chat({"mask": 0.5}), "mask=0.5"),
        (chat({}, weight="high"), "in the row"),
        (chat({"train_detail": [{"begin_offset": 0}]}), "train_detail"),
        (chat({"refusal": "I will not"}), "refusal"),
        (chat({}, images=["a.png"]), '"images"'),
        (chat({}, chat_template_kwargs={"enable_thinking": False}), "chat_template_kwargs"),
        (chat({}, mask="Assistant"), '"mask"'),
        (chat({}, rejected="x"), "half of a preference"),
        ({"instruction": "q", "output": "a", "rejected": "b"}, "half of a preference"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(row, words):
    with pytest.raises(DataError, match=words):
        record(row)


def test_what_says_nothing_is_not_refused():
    assert record(chat({"train_detail": None, "refusal": None}, images=[], mask="User", chat_template_kwargs={}))
    assert record({"instruction": "q", "output": "a", "rejected": "b"}, setting="alpaca").kind == "sft"
    assert record(chat({}, images=["a.png"]), ignored=("images",)).kind == "sft"
    with pytest.raises(ConfigError, match="wieght") as caught:
        record(chat({}), ignored=("wieght",))
    assert "weight" in caught.value.todo


def test_every_listed_key_says_what_becomes_of_it():
    assert all(meaning.honoured or meaning.refused for meaning in (*ROW.values(), *TURN.values()))
    assert all(meaning.layouts for meaning in (*ROW.values(), *TURN.values()))


# ---- thoughts ----


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "4", "reasoning_content": "two"},
        {"content": "4", "reasoning": "two"},
        {"content": "4", "thinking": "two", "reasoning": "two", "reasoning_content": ""},
        {"content": [{"type": "thinking", "thinking": "two"}, {"type": "text", "text": "4"}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "two"}]},
                {"type": "text", "text": "4"},
            ]
        },
        {"content": [{"type": "reasoning", "text": "two"}, {"type": "output_text", "text": "4"}]},
    ],
)
def test_thoughts_by_any_key(turn):
    result = record({"messages": [{"role": "user", "content": "q"}, {"role": "assistant"} | turn]})
    assert result.messages[1] == Message("assistant", "4", thought="two")
    assert result.response == "<think>\ntwo\n</think>\n\n4"


def test_thoughts_that_contradict():
    with pytest.raises(DataError, match="two different thoughts"):
        record(chat({"reasoning": "a", "thinking": "b"}))
    with pytest.raises(DataError, match="the user speaks"):
        record(
            {"messages": [{"role": "user", "content": "q", "reasoning": "r"}, {"role": "assistant", "content": "a"}]}
        )


# ---- calls ----

CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "Rome"}}}


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None, "tool_calls": [{"id": "a1"} | CALL]},
        {"content": "", "tool_calls": [{"function": {"name": "w", "arguments": '{"city": "Rome"}'}}]},
        {"tool_calls": json.dumps([CALL])},
        {"content": None, "function_call": {"name": "w", "arguments": '{"city":"Rome"}'}},
    ],
)
def test_calls_by_any_key(turn):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant"} | turn,
        {"role": "tool", "content": "sun", "tool_call_id": "a1", "name": "w"},
        {"role": "assistant", "content": "Sunny"},
    ]
    result = record({"messages": turns, "tools": "[]"})
    (call,) = result.messages[1].calls
    assert {key: call[key] for key in CALL} == CALL and result.messages[1].content == ""
    assert json.loads(result.messages[1].text) == {"name": "w", "arguments": {"city": "Rome"}}
    assert (result.messages[2].call_id, result.messages[2].name, result.tools) == ("a1", "w", ())


def test_a_turn_that_is_a_call():
    """ShareGPT writes calls as the text of a turn of their own."""
    said = '{"name": "w", "arguments": {"city": "Rome"}}'
    turns = [("human", "q"), ("function_call", said), ("observation", "sun"), ("gpt", "Sunny")]
    message = record({"conversations": [{"from": who, "value": what} for who, what in turns]}).messages[1]
    assert message == Message("assistant", said, calls=(CALL,), spelled=True) and message.text == said
    with pytest.raises(DataError, match="without a name in turn 2"):
        record({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "w()"}]})


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("tool", [{"name": "w"}, {"type": "function", "function": {"name": "w"}}])
def test_tools_of_a_row(key, as_text, tool):
    tools = [json.dumps([tool]) if as_text else [tool]][0]
    for row in (chat({}), {"instruction": "q", "output": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}):
        assert record(row | {key: tools}).tools == ({"type": "function", "function": {"name": "w"}},)
    with pytest.raises(DataError, match=f"{key} that are no list"):
        record(chat({}) | {key: ["w"]})


def test_messages_survive_being_written():
    turns = [
        Message("user", "q", name="Ann"),
        Message("assistant", "a", weight=0.5, thought="two", calls=(CALL,)),
        Message("assistant", '{"name": "w", "arguments": {"city": "Rome"}}', calls=(CALL,), spelled=True),
        Message("tool", "sun", call_id="a1"),
    ]
    assert messages_of({"messages": json.loads(json.dumps([turn.turn() for turn in turns]))}) == tuple(turns)


# ---- further columns and layouts ----


def test_history_stands_before_the_row():
    row = {"instruction": "And its capital?", "input": "", "output": "Rome", "system": "Be brief"}
    history = [["Name a country", "Italy"], ["Another", "France"]]
    expected = (S("Be brief"), U("Name a country"), A("Italy"), U("Another"), A("France"), U("And its capital?"))
    assert record(row | {"history": history}).prompt == expected
    assert record(row | {"history": json.dumps(history)}).prompt == expected
    assert record(row | {"history": []}).prompt == (expected[0], expected[-1])
    asked = {"prompt": "And its capital?", "system": "Be brief", "history": history}
    assert record(asked | {"completion": "Rome"}).prompt == record(asked | {"chosen": "a", "rejected": "b"}).messages
    with pytest.raises(DataError, match="history that is no list of pairs"):
        record(row | {"history": ["Name a country"]})
    with pytest.raises(DataError, match="empty pair 1 of history"):
        record(row | {"history": [["Name a country", ""]]})


@pytest.mark.parametrize(
    "row",
    [
        chat({}),
        {"conversations": chat({})["messages"]},
        {"prompt": "q0", "completion": "a0"},
        {"prompt": "q0", "response": "a0"},
        {"instruction": "q0", "output": "a0"},
    ],
)
@pytest.mark.parametrize("mark", ["label", "kto_tag"])
@pytest.mark.parametrize("wanted", [True, False])
def test_feedback_in_any_layout(row, mark, wanted):
    result = record(row | {mark: wanted})
    assert (result.kind, result.label, result.messages) == ("binary", int(wanted), (U("q0"), A("a0")))


def test_labels_that_are_no_feedback():
    assert record({"instruction": "q", "output": "a", "label": "joy"}).kind == "sft"
    assert record(chat({}, label=True), setting="messages").kind == "sft"
    assert record(chat({}, label=True), ignored=("label",)).kind == "sft"
    with pytest.raises(DataError, match="neither true nor false: 'joy'"):
        record(chat({}, label="joy"))


ASKED = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "q"}]}
        | {side: {"from": "gpt", "value": text} for side, text in (("chosen", "good"), ("rejected", "bad"))},
        {"messages": [ASKED], "chosen": "good", "rejected": "bad"},
        {"messages": [ASKED, {"role": "assistant", "content": "good"}], "rejected_response": "bad"},
        {"prompt": "q"}
        | {
            side: [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]
            for side, text in (("chosen", "good"), ("rejected", "bad"))
        },
    ],
    ids=["conversations", "messages", "rejected_response", "from and value"],
)
def test_pairs_in_other_layouts(row):
    result = record(row)
    assert (result.kind, result.messages, result.chosen, result.rejected) == (
        "pairs",
        (U("q"),),
        (A("good"),),
        (A("bad"),),
    )


def test_equal_answers_make_no_pair():
    with pytest.raises(DataError, match=r"row 0 .* equals the rejected one"):
        record({"prompt": "q", "chosen": "a", "rejected": "a"})


def test_numbers_are_text_and_nan_is_missing():
    nan = float("nan")
    assert record({"instruction": "2+2", "input": nan, "output": 4}).messages == (U("2+2"), A("4"))
    assert record({"prompt": 7, "completion": 0.5, "system": nan, "weight": nan}).messages == (U("7"), A("0.5"))
    assert record({"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": 2}]}).response == "2"
    assert record({"prompt": "q", "chosen": 4, "rejected": 5}).chosen == (A("4"),)
