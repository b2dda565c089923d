"""The three answers to an exam task."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import ftrun
from ftrun.config.compose import load
from ftrun.data.pool import load_pool
from ftrun.data.records import Message, Record
from ftrun.data.render import Renderer
from ftrun.errors import ConfigError, DataError
from ftrun.tokens.policies.cot_with_topic import CotWithTopic
from ftrun.tokens.run import edit_rows

ROW = {
    "question": "What follows 2?",
    "options": ["one", "three", "five"],
    "answer": "B",
    "solution": "Counting goes 1, 2, 3.",
    "topic": "Numbers",
}
COLUMNS = {"prompt": "question", "completion": "solution"}
FORMS = ("letters", "cot", "topic_cot")


def record(**changes) -> Record:
    fields = ROW | changes
    turns = (Message("user", fields["question"]), Message("assistant", fields["solution"]))
    return Record(0, "sft", messages=turns, answer=fields["answer"], fields=fields)


def form(target: str, context, **changes) -> tuple[str, str]:
    [line] = CotWithTopic(target=target).edit([record(**changes)], context())  # type: ignore[arg-type]
    asked, answer = line["messages"]
    return asked["content"], answer["content"]


def test_the_three_answers(context):
    assert form("letters", context)[1] == "Answer: B"
    assert form("cot", context)[1] == "Answer:\nCounting goes 1, 2, 3.\nAnswer: B"
    assert form("topic_cot", context)[1] == "Answer:\nTOPIC: Numbers\nCounting goes 1, 2, 3.\nAnswer: B"


def test_the_prompt_is_the_same_but_for_how_much_it_asks(context):
    letters, cot, topic = (form(target, context)[0] for target in FORMS)
    assert cot == topic
    assert "a detailed answer" in cot and "only the letter" not in cot
    assert "only the letter" in letters and "detailed" not in letters
    assert letters.partition("\n\n")[2] == cot.partition("\n\n")[2]
    assert cot.endswith("Task: What follows 2?\n\nOptions:\nA - one\nB - three\nC - five")


def test_letters_tell_nothing_of_the_solution(context):
    assert not any(word in "".join(form("letters", context)) for word in ("Counting", "TOPIC", "Numbers"))


@pytest.mark.parametrize(
    ("answer", "options", "letters"),
    [
        (1, ["a", "b"], "B"),
        ([0, 2], ["a", "b", "c"], "A;C"),
        (["A", "C"], {"A": "x", "C": "y"}, "A;C"),
        ("1-A, 2-B", "x\ny", "1-A, 2-B"),
        (7, None, "7"),
    ],
)
def test_answers_and_options_come_in_several_shapes(answer, options, letters, context):
    asked, said = form("letters", context, answer=answer, options=options)
    assert said == f"Answer: {letters}"
    assert ("Options:" in asked) == (options is not None)
    assert ("only the letter" in asked) == (options is not None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": None}, "no answer"),
        ({"answer": 5}, "3 options"),
        ({"options": 3}, "no list of up to 26"),
        ({"options": ["x"] * 27}, "no list of up to 26"),
        ({"options": {"text": ["x", "y"], "label": ["A", "B"]}}, "no list of up to 26"),
        ({"options": [{"A": "x"}, {"B": "y"}]}, "no list of up to 26"),
        ({"topic": " "}, 'no text in the column "topic"'),
    ],
)
def test_rows_that_lack_something_are_refused(changes, message, context):
    with pytest.raises(DataError, match=message):
        form("topic_cot", context, **changes)


@pytest.mark.parametrize(
    "before",
    [(), ("user", "assistant", "user"), ("assistant", "user"), ("user", "user"), ("system",)],
)
def test_rows_of_several_turns_or_none_are_refused(before, context):
    """Nothing of a conversation is left out in silence."""
    turns = (*(Message(role, "said") for role in before), Message("assistant", "Counting."))
    with pytest.raises(DataError, match="row 0 is not one question"):
        list(CotWithTopic().edit([replace(record(), messages=turns)], context()))


def test_a_system_prompt_stays(context):
    turns = (Message("system", "be brief"), *record().messages)
    [line] = CotWithTopic().edit([replace(record(), messages=turns)], context())
    assert [turn["role"] for turn in line["messages"]] == ["system", "user", "assistant"]
    assert line["messages"][0]["content"] == "be brief"


@pytest.mark.parametrize("knobs", [{"keyword": " "}, {"ask": "{question}"}, {"ask": "{"}])
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        CotWithTopic(**knobs)


@pytest.fixture
def exam(tmp_path):
    file = tmp_path / "exam.jsonl"
    file.write_text("".join(json.dumps(ROW | {"question": f"What follows {i}?"}) + "\n" for i in range(12)))
    return file


@pytest.mark.parametrize("target", FORMS)
def test_one_beginning_of_text_in_every_sequence(target, exam, context, bundle, tmp_path):
    """The template writes it, and so does the tokenizer when it is asked for special tokens."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = bundle.tokenizer
    tokenizer.bos_token = "<|endoftext|>"
    bos = tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    assert tokenizer("a")["input_ids"][0] == bos
    ctx = context()
    ctx.settings.data = replace(ctx.settings.data, path=str(exam), columns=COLUMNS)
    pool = edit_rows(CotWithTopic(target=target), load_pool(ctx.settings.data, tmp_path / "work", 0), ctx)
    for row in pool:
        [sequence] = Renderer(tokenizer).sequences(row)
        assert sequence.input_ids.tolist().count(bos) == 1 and sequence.input_ids[0] == bos
        assert Renderer(tokenizer).prompt_ids(row).count(bos) == 1


def test_a_run_trains_what_rank_16_has(exam, tiny_dir, tmp_path):
    overrides = [
        "recipe=cot_with_topic_qlora",
        f"model.path={tiny_dir}",
        f"data.path={exam}",
        f"out={tmp_path / 'run'}",
    ]
    more = ["train.max_steps=1", "data.max_length=500", "eval.generation.max_new_tokens=4", "data.heldout=0.3"]
    summary = ftrun.run("train", overrides=[*overrides, *more])
    linears = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]  # q k v o gate up down
    assert summary["trainable_parameters"] == 2 * 16 * sum(map(sum, linears))
    lines = (tmp_path / "run/eval/predictions/generation.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["gold"] == "Answer: B" for line in lines)


def test_the_recipe_has_the_values_of_the_paper():
    settings = load(["recipe=cot_with_topic_qlora"]).settings
    assert settings.choice("quant") == "nf4" and settings.seed == 42 and settings.train.epochs == 4
    knobs = settings.component("adapter")
    assert (knobs.r, knobs.lora_alpha, knobs.lora_dropout) == (16, 16, 0.05)
    assert dict(settings.eval)["generation"]["metric"] == "contains"
