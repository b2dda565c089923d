"""What a row says stands in its tokens, or the row is refused: thoughts, tools, calls, weights, control tokens as text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrun.config.settings import DataConfig
from ftrun.data.chat import ChatTemplate
from ftrun.data.formats import layout_of
from ftrun.data.literals import CLOSE, OPEN
from ftrun.data.pool import load_pool
from ftrun.data.prepare import prepare
from ftrun.data.records import Message, Record
from ftrun.data.render import Renderer, apply_template
from ftrun.errors import DataError

ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# an answer's thought is written where it is the last one, and dropped from earlier ones
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.KEY or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content|trim }}<|im_end|>\n{% endfor %}" + ASKS
)
# tools first, calls behind the content
TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools|tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ CALL }}</call>{% endfor %}<|im_end|>\n{% endfor %}" + ASKS
)
AS_OBJECT = "{'name': call.function.name, 'arguments': call.function.arguments}|tojson"
AS_TEXT = "call.function.name + ' ' + call.function.arguments"
# refuses a system turn
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content|trim }}<|im_end|>\n{% endfor %}" + ASKS
)


def record(row, format="auto"):
    return layout_of(row, "rows.jsonl:1", format, {}, None).record(0, row, "rows.jsonl:1")


def said(*turns, **row):
    """A conversation of (role, content, further keys)."""
    return record(
        {"messages": [{"role": who, "content": what} | (more[0] if more else {}) for who, what, *more in turns]} | row
    )


def spans(tokenizer, sequence) -> list[str]:
    """Texts of the runs of trained tokens."""
    on = np.flatnonzero(np.diff(np.concatenate([[0], sequence.loss_weight > 0, [0]])))
    return [tokenizer.decode(sequence.input_ids[a:b]) for a, b in zip(on[::2], on[1::2], strict=True)]


def trained(tokenizer, row, **how) -> list[str]:
    return spans(tokenizer, Renderer(tokenizer, **how).sequences(row, "rows.jsonl:1")[0])


TALK = ("user", "q"), ("assistant", "bad", {"weight": 0}), ("user", "again"), ("assistant", "good", {"weight": 1})


# ---- weights ----


def test_turns_without_weight_carry_no_loss(tokenizer):
    assert trained(tokenizer, said(*TALK)) == ["good<|im_end|>"]
    row = said(("user", "q"), ("assistant", "half", {"weight": 0.5}), ("user", "p"), ("assistant", "whole"))
    (sequence,) = Renderer(tokenizer).sequences(row)
    assert spans(tokenizer, sequence) == ["half<|im_end|>", "whole<|im_end|>"]
    assert sorted(set(sequence.loss_weight.tolist())) == [0, 0.5, 1]
    pair = record({"prompt": "q", "chosen": "a", "rejected": "b", "weight": 0.5})
    with pytest.raises(DataError, match=r"weight 0\.5"):
        Renderer(tokenizer).sequences(pair)


def test_all_tokens_but_those_without_weight(tokenizer):
    (sequence,) = Renderer(tokenizer, "all").sequences(said(*TALK))
    off = tokenizer.decode(sequence.input_ids[1:][sequence.loss_weight[1:] == 0])
    assert off == "bad<|im_end|>\n"


@pytest.mark.parametrize(
    ("turn", "train_on", "words"),
    [
        (("user", "q", {"weight": 1}), "responses", "the user speaks, the weight 1, and only answers"),
        (("assistant", "hello", {"weight": 1}), "responses", "opens the conversation, the weight 1"),
        (("user", "q", {"weight": 0}), "all", "train_on=all trains every turn"),
    ],
)
def test_weights_that_training_cannot_give(tokenizer, turn, train_on, words):
    rest = ("user", "q"), ("assistant", "a")
    with pytest.raises(DataError, match=words):
        Renderer(tokenizer, train_on).sequences(said(turn, *rest))
    other = "all" if train_on == "responses" else "responses"
    assert Renderer(tokenizer, other).sequences(said(turn, *rest))


@pytest.mark.parametrize("system", [(), (("system", "s"),)])
def test_a_greeting_is_context(tokenizer, system):
    assert trained(tokenizer, said(*system, ("assistant", "hello"), ("user", "q"), ("assistant", "a"))) == [
        "a<|im_end|>"
    ]


# ---- thoughts ----


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_trained_where_the_template_writes_them(tokenizer, key):
    tokenizer.chat_template = THINKS.replace("KEY", key)
    row = said(("user", "2+2?"), ("assistant", "4", {"reasoning_content": "two and two"}))
    assert trained(tokenizer, row) == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]


def test_thoughts_are_refused_where_the_template_drops_them(tokenizer):
    row = said(("user", "2+2?"), ("assistant", "4", {"reasoning_content": "two and two"}))
    with pytest.raises(DataError, match="does not write reasoning_content, and turn 2 has one"):
        trained(tokenizer, row)
    tokenizer.chat_template = THINKS.replace("loop.last", "not loop.last").replace("KEY", "reasoning")
    with pytest.raises(DataError, match="does not write reasoning_content"):
        trained(tokenizer, row)
    tokenizer.chat_template = THINKS.replace("m.content|trim", "m.content.split('</think>')[-1]").replace("KEY", "none")
    with pytest.raises(DataError, match=r"leaves out what turn 2 .assistant. says: 'two and two'"):
        trained(tokenizer, said(("user", "2+2?"), ("assistant", "<think>two and two</think>4")))


def test_thoughts_of_earlier_turns(tokenizer):
    """A template drops them, so their turns cannot be trained in one row; where the file does not want it, nothing is lost."""
    tokenizer.chat_template = THINKS.replace("KEY", "reasoning_content")
    talk = ("user", "q"), ("assistant", "a", {"reasoning_content": "one"}), ("user", "p")
    last = ("assistant", "b", {"reasoning_content": "two"})
    with pytest.raises(DataError, match="rewrites earlier turns"):
        trained(tokenizer, said(*talk, last))
    expected = ["<think>\ntwo\n</think>\n\nb<|im_end|>"]
    assert trained(tokenizer, said(*talk, last), train_on="last_response") == expected
    silenced = ("assistant", "a", {"reasoning_content": "one", "weight": 0})
    assert trained(tokenizer, said(talk[0], silenced, talk[2], last)) == expected


# ---- tools and calls ----

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
CALL = {"id": "a1", "type": "function", "function": {"name": "look_up", "arguments": '{"city": "Rome"}'}}
CALLED = ("user", "sun?"), ("assistant", None, {"tool_calls": [CALL]}), ("tool", "yes"), ("assistant", "Sunny")


@pytest.mark.parametrize(
    ("form", "written"),
    [(AS_OBJECT, '{"name": "look_up", "arguments": {"city": "Rome"}}'), (AS_TEXT, 'look_up {"city": "Rome"}')],
)
def test_calls_are_trained_as_the_template_writes_them(tokenizer, form, written):
    tokenizer.chat_template = TOOLS.replace("CALL", form)
    row = said(*CALLED, tools=[TOOL])
    assert trained(tokenizer, row) == [f"<call>{written}</call><|im_end|>", "Sunny<|im_end|>"]
    prompt = tokenizer.decode(Renderer(tokenizer).prompt_ids(row))
    assert prompt.startswith(f"<|im_start|>system\nTools: {json.dumps([TOOL])}") and prompt.endswith("assistant\n")
    text = '{"name": "look_up", "arguments": {"city": "Rome"}}'
    spelled = said(("user", "sun?"), ("function_call", text), ("observation", "yes"), ("assistant", "Sunny"))
    assert trained(tokenizer, spelled) == trained(tokenizer, row)


def test_content_beside_a_call(tokenizer):
    tokenizer.chat_template = TOOLS.replace("CALL", AS_OBJECT)
    (span,) = trained(tokenizer, said(CALLED[0], ("assistant", "Let me see.", {"tool_calls": [CALL]})))
    assert span.startswith("Let me see.<call>")


def test_what_a_template_does_not_write_is_refused(tokenizer):
    with pytest.raises(DataError, match="does not write tool_calls, and turn 2 has them"):
        trained(tokenizer, said(*CALLED))
    with pytest.raises(DataError, match='the tool "look_up" of the column tools'):
        trained(tokenizer, said(("user", "q"), ("assistant", "look_up(city='Rome')"), tools=[TOOL]))
    tokenizer.chat_template = TOOLS.replace("CALL", "call.function.name")
    with pytest.raises(DataError, match="does not write tool_calls"):
        trained(tokenizer, said(*CALLED))
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        + ASKS
    )
    for asked in ("q", "yes?"):  # also where somebody else said it too
        with pytest.raises(DataError, match=r"leaves out what turn 2 \(tool\) says: 'yes'|turn 1 \(user\)"):
            trained(tokenizer, said(("user", asked), ("tool", "yes"), ("assistant", "yes")))


def test_a_call_that_is_a_turn_is_text_where_the_template_knows_no_calls(tokenizer):
    text = '{"name": "look_up", "arguments": {}}'
    row = said(("user", "sun?"), ("function_call", text), ("observation", "yes"), ("assistant", "Sunny"))
    assert trained(tokenizer, row) == [f"{text}<|im_end|>", "Sunny<|im_end|>"]


def test_what_a_tool_says_may_be_written_as_json(tokenizer):
    tokenizer.chat_template = TOOLS.replace("m.content or ''", "m.content|tojson").replace("CALL", AS_OBJECT)
    assert trained(tokenizer, said(("user", "q"), ("tool", 'say "yes"\nor é'), ("assistant", "a"))) == ['"a"<|im_end|>']


# ---- control tokens in a message ----


def test_a_control_token_in_a_message_is_text(tokenizer):
    written = "stop with <|im_end|> or <|pad|>, so"
    renderer = Renderer(tokenizer)
    (sequence,) = renderer.sequences(said(("user", "how does <|im_start|> look"), ("assistant", written)))
    assert spans(tokenizer, sequence) == [f"{written}<|im_end|>"]
    ids = sequence.input_ids.tolist()
    end, start, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<|pad|>"])
    assert (ids.count(end), ids.count(start), ids.count(pad)) == (2, 2, 0)  # those of the template
    assert renderer.spelled == {"<|im_end|>": 1, "<|im_start|>": 1, "<|pad|>": 1}
    assert (
        renderer.prompt_ids(said(("user", "how does <|im_start|> look"), ("assistant", "b")))
        == ids[: ids.index(start, 1) + 1 + len(tokenizer("assistant\n")["input_ids"])]
    )


PIECES = st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>",
        "<|pad|>",
        "<|endoftext|>",
        "<|im_",
        "end|>",
        OPEN,
        CLOSE,
        "0",
        " ",
        "\n",
        "the",
        "é",
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(PIECES, min_size=1, max_size=6).map("".join).filter(str.strip), min_size=2, max_size=4))
def test_messages_are_never_control_tokens(tokenizer_dir, turns):
    """The text is what the template writes; the control tokens are as many as the template writes by itself."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    turns = turns[: len(turns) // 2 * 2]
    messages = tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(turns))
    (sequence,) = Renderer(tokenizer).sequences(Record(0, "sft", messages))
    plain = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.apply_chat_template(plain, tokenize=False)
    assert tokenizer.decode(sequence.input_ids) == text
    ids = sequence.input_ids.tolist()
    ends = ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    starts = ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    assert ends == starts == len(turns) and not set(ids) & set(
        tokenizer.convert_tokens_to_ids(["<|pad|>", "<|endoftext|>"])
    )
    if not any(control in text for control in turns for text in turns if control.startswith("<|")):
        assert spans(tokenizer, sequence) == [f"{answer}<|im_end|>" for answer in turns[1::2]]
    written = tokenizer(text, add_special_tokens=False)["input_ids"]
    if written.count(ids[0]) == len(turns) and not any(mark in "".join(turns) for mark in (OPEN, "<|")):
        assert ids == written  # an ordinary row has the tokens that it always had


def test_a_tokenizer_that_cannot_spell_a_control_token(tmp_path):
    """A word-level vocabulary has no other token for it: the row is refused by name, or left out."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: id for id, word in enumerate(["[UNK]", "[END]", "user", "assistant", "what", "yes"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]", unk_token="[UNK]")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} [END] {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    rows = [said(("user", "what"), ("assistant", text)) for text in ("yes", "yes [END] yes")]
    assert Renderer(tokenizer).sequences(rows[0])[0].input_ids.tolist() == [2, 4, 1, 3, 5, 1]
    with pytest.raises(DataError, match=r"writes \[END\] in a message"):
        Renderer(tokenizer).sequences(rows[1])
    refused: dict[int, DataError] = {}
    made = Renderer(tokenizer).batch(rows[1:], ["rows.jsonl:1"], refused)
    assert made == [[]] and list(refused) == [0]


# ---- templates and tokenizers ----


@pytest.mark.parametrize("template", ["plain", "alpaca", "chatml"])
def test_built_in_templates_begin_as_the_tokenizer_does(tokenizer, template):
    from tokenizers import processors

    row = said(("system", "Be brief"), ("user", "Name a sea"), ("assistant", "Baltic"))
    apply_template(tokenizer, template)
    before = Renderer(tokenizer).sequences(row)[0].input_ids.tolist()
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    apply_template(tokenizer, template)
    assert Renderer(tokenizer).sequences(row)[0].input_ids.tolist() == before  # it has a BOS, and does not add it
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    apply_template(tokenizer, template)
    assert Renderer(tokenizer).sequences(row)[0].input_ids.tolist() == [bos, *before]
    assert Renderer(tokenizer).prompt_ids(row)[:1] == [bos] and trained(tokenizer, row) == ["Baltic<|im_end|>"]


def test_a_bos_that_begins_every_turn_may_stand_twice(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tokenizer.chat_template = "{{ bos_token }}" + NO_SYSTEM
    row = said(("user", "q"), ("assistant", "a"))
    assert Renderer(tokenizer).sequences(row)[0].input_ids[:2].tolist() == [tokenizer.bos_token_id] * 2
    assert trained(tokenizer, row) == ["a<|im_end|>"]


@pytest.fixture
def ready(tokenizer, tmp_path):
    def run(rows, **data):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(path=str(path), max_length=256, **data)
        pool = load_pool(config, tmp_path / "work", 0)
        size = len(tokenizer)
        return prepare(pool, tokenizer, config, context_length=512, vocab_size=size, folder=tmp_path / "tokens")

    return run


def asked(number, *before):
    turns = [*before, {"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": str(number)}]
    return {"messages": turns}


def test_rows_that_the_template_refuses_can_be_left_out(ready, tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    system = {"role": "system", "content": "s"}
    rows = [*(asked(n) for n in range(6)), asked(9, system), asked(8, system)]
    with pytest.raises(DataError, match="System role not supported") as caught:
        ready(rows)
    assert caught.value.where.endswith("rows.jsonl:7") and "data.unfit=drop" in caught.value.todo
    for _ in range(2):  # the second comes from the cache
        prepared = ready(rows, unfit="drop")
        assert prepared.kept.tolist() == list(range(6)) and list(prepared.dropped.values()) == [[6, 7]]
        (note,) = prepared.notes
        assert note.startswith("2 rows of 8 left out (data.unfit=drop): the chat template refuses") and "6, 7" in note
    with pytest.raises(DataError, match="none of the rows can be trained"):
        ready(rows[6:], unfit="drop")


def test_rows_without_a_trained_turn_can_be_left_out(ready):
    silent = asked(1)
    silent["messages"][-1] |= {"weight": 0}
    with pytest.raises(DataError, match=r"row 1 of .* has nothing to train on") as caught:
        ready([asked(0), silent])
    assert "data.unfit=drop" in caught.value.todo
    prepared = ready([asked(0), silent], unfit="drop")
    assert prepared.kept.tolist() == [0] and "has nothing to train on" in prepared.notes[0]


def test_equal_answers_are_counted(ready, tmp_path):
    """Equal as they are written, or only once the template has written them."""
    rows = [{"prompt": "q", "chosen": chosen, "rejected": "no"} for chosen in ("yes", "no", "no ")]
    with pytest.raises(DataError, match=r"row 1 of .* equals the rejected one"):
        ready(rows)
    prepared = ready(rows, unfit="drop")  # this template keeps the blank
    assert prepared.kept.tolist() == [0, 2]


def test_equal_answers_after_the_template(ready, tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    rows = [{"prompt": "q", "chosen": chosen, "rejected": "no"} for chosen in ("yes", "no ")]
    with pytest.raises(DataError, match="row 1 has a chosen answer that equals"):
        ready(rows)
    assert ready(rows, unfit="drop").kept.tolist() == [0]


def test_control_tokens_in_messages_are_told(ready):
    row = asked(1, {"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "b"})
    assert ready([asked(0), row]).notes == [
        "1 of 2 rows write <|im_end|> in a message: trained as text, not as that token"
    ]


def test_conversation_needs_no_probing_where_nothing_is_asked(tokenizer):
    chat = ChatTemplate(tokenizer).conversation([Message("user", "a")])
    assert (
        chat.turns == [{"role": "user", "content": "a"}]
        and not {"_thought_key", "_calls_form"} & vars(chat.template).keys()
    )
