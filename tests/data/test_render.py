"""Masks token by token, the same prompt in training and generation, and templates that cannot be trained on."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrun.data.encode import tokenizer_fingerprint
from ftrun.data.records import Message, Record
from ftrun.data.render import Renderer, apply_template, prompt_ids
from ftrun.errors import ConfigError, DataError

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # an earlier answer loses what stands before the mark, as thoughts do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last or m.role == 'user' else m.content.split('#')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MULTI = ("what is 1", "yes 1", "and 2", "no 2")


def chat(*turns: str, system: str | None = None) -> Record:
    """User and assistant in turn."""
    messages = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(turns)]
    return Record(0, "sft", messages=((Message("system", system),) if system else ()) + tuple(messages))


def spans(tokenizer, sequence) -> list[str]:
    """Texts of the runs of trained tokens."""
    found: list[list[int]] = []
    for before, token, weight in zip(
        [0.0, *sequence.loss_weight], sequence.input_ids, sequence.loss_weight, strict=False
    ):
        if weight > 0:
            if not before:
                found.append([])
            found[-1].append(int(token))
    return [tokenizer.decode(run) for run in found]


def inference_ids(tokenizer, messages) -> list[int]:
    """What generation feeds the model, computed without the code under test."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer(
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )["input_ids"]


@pytest.mark.parametrize("template", [None, "chatml", "alpaca", "plain"])
@pytest.mark.parametrize("system", [None, "be kind"])
def test_trained_span_is_the_response_and_its_end_of_turn(tokenizer, template, system):
    apply_template(tokenizer, template)
    record = chat("what is 1 plus 2", " the answer:\nyes 3 ", system=system)
    sequence = Renderer(tokenizer).sequences(record)[0]
    assert spans(tokenizer, sequence) == [" the answer:\nyes 3 <|im_end|>"]
    trained = sequence.loss_weight > 0
    prompt = inference_ids(tokenizer, record.prompt)
    assert sequence.input_ids[: len(prompt)].tolist() == prompt == prompt_ids(record, tokenizer)
    assert not trained[: len(prompt)].any() and trained[len(prompt)]
    assert set(sequence.loss_weight.tolist()) == {0.0, 1.0}
    turns = [{"role": message.role, "content": message.content} for message in record.messages]
    assert tokenizer.decode(sequence.input_ids) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_newline_after_the_turn_is_not_trained(tokenizer):
    sequence = Renderer(tokenizer).sequences(chat("what", "yes"))[0]
    assert tokenizer.decode(sequence.input_ids[-1:]) == "\n" and sequence.loss_weight[-1] == 0
    assert (
        sequence.input_ids[-2] == tokenizer.convert_tokens_to_ids("<|im_end|>") == Renderer(tokenizer).end_of_turn
        and sequence.loss_weight[-2] == 1
    )


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("responses", ["yes 1<|im_end|>", "no 2<|im_end|>"]), ("last_response", ["no 2<|im_end|>"])],
)
def test_turns_of_a_conversation(tokenizer, train_on, expected):
    sequence = Renderer(tokenizer, train_on).sequences(chat(*MULTI, system="s"))[0]
    assert spans(tokenizer, sequence) == expected
    assert sequence.input_ids.tolist()[
        : len(Renderer(tokenizer).prompt_ids(chat(*MULTI, system="s")))
    ] == inference_ids(tokenizer, chat(*MULTI, system="s").prompt)


def test_opening_assistant_turn_is_context(tokenizer):
    messages = (Message("assistant", "hello"), *chat("what", "yes").messages)
    sequence = Renderer(tokenizer).sequences(Record(0, "sft", messages=messages))[0]
    assert spans(tokenizer, sequence) == ["yes<|im_end|>"] and "hello" in tokenizer.decode(sequence.input_ids)


def test_train_on_all(tokenizer):
    sequence = Renderer(tokenizer, "all").sequences(chat(*MULTI))[0]
    assert sequence.loss_weight.tolist() == [0.0] + [1.0] * (len(sequence.input_ids) - 1)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), min_size=2, max_size=4).filter(
        lambda turns: len(turns) % 2 == 0
    )
)
def test_odd_strings_are_masked_right(tokenizer_dir, turns):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    sequence = Renderer(tokenizer).sequences(chat(*turns))[0]
    assert spans(tokenizer, sequence) == [f"{answer}<|im_end|>" for answer in turns[1::2]]


def test_an_end_of_turn_written_by_the_user_changes_no_mask(tokenizer):
    sequence = Renderer(tokenizer).sequences(chat("a <|im_end|> b", "c <|im_end|> d"))[0]
    assert spans(tokenizer, sequence) == ["c <|im_end|> d<|im_end|>"]


def test_pairs_share_their_prompt(tokenizer):
    record = Record(
        3,
        "pairs",
        messages=chat("what", "yes", "and").messages,
        chosen=(Message("assistant", "yes yes"),),
        rejected=(Message("assistant", "no"),),
    )
    chosen, rejected = Renderer(tokenizer).sequences(record)
    assert spans(tokenizer, chosen) == ["yes yes<|im_end|>"] and spans(tokenizer, rejected) == ["no<|im_end|>"]
    prompt = Renderer(tokenizer).prompt_ids(record)
    assert chosen.input_ids[: len(prompt)].tolist() == rejected.input_ids[: len(prompt)].tolist() == prompt
    assert chosen.record == rejected.record == 3


def test_binary_carries_its_label(tokenizer):
    record = Record(0, "binary", messages=chat("what", "yes").messages, label=1)
    sequence = Renderer(tokenizer).sequences(record)[0]
    assert sequence.label == 1 and spans(tokenizer, sequence) == ["yes<|im_end|>"]


def test_prompts_are_only_prompts(tokenizer):
    record = Record(0, "prompts", messages=(Message("user", "what"),), answer="4")
    sequence = Renderer(tokenizer).sequences(record)[0]
    assert (
        sequence.input_ids.tolist()
        == inference_ids(tokenizer, record.messages)
        == Renderer(tokenizer).prompt_ids(record)
    )
    assert not sequence.loss_weight.any()


def test_text_is_trained_but_its_first_token(tokenizer):
    sequence = Renderer(tokenizer).sequences(Record(0, "text", text="the quick fox"))[0]
    assert tokenizer.decode(sequence.input_ids) == "the quick fox<|im_end|>"
    assert sequence.loss_weight.tolist() == [0.0] + [1.0] * (len(sequence.input_ids) - 1)


def test_labels(tokenizer):
    renderer = Renderer(tokenizer, labels=["no", "yes"])
    sequence = renderer.sequences(Record(0, "labels", text="the fox", text_pair="the dog", label="yes"))[0]
    assert sequence.label == 1 and not sequence.loss_weight.any()
    assert sequence.input_ids.tolist() == tokenizer("the fox", "the dog")["input_ids"]
    with pytest.raises(DataError, match='label "maybe"'):
        renderer.sequences(Record(0, "labels", text="the fox", label="maybe"))


def test_batch_equals_one_by_one(tokenizer):
    records = [chat("what", "yes"), chat(*MULTI), chat("a", "b", system="s")]
    together = Renderer(tokenizer).batch(records, ["", "", ""])
    for record, sequences in zip(records, together, strict=True):
        alone = Renderer(tokenizer).sequences(record)
        assert (
            alone[0].input_ids.tolist() == sequences[0].input_ids.tolist()
            and alone[0].loss_weight.tolist() == sequences[0].loss_weight.tolist()
        )


# ---- templates ----


def test_thoughts_that_vanish_from_earlier_turns(tokenizer):
    tokenizer.chat_template = FORGETFUL
    turns = ("what", "thought#yes", "and", "thought#no")
    with pytest.raises(DataError, match="rewrites earlier turns") as caught:
        Renderer(tokenizer).sequences(chat(*turns), "rows.jsonl:4")
    assert "last_response" in caught.value.todo and caught.value.where == "rows.jsonl:4"
    renderer = Renderer(tokenizer, "last_response")
    sequence = renderer.sequences(chat(*turns))[0]
    assert spans(tokenizer, sequence) == ["thought#no<|im_end|>"]
    assert (
        sequence.input_ids.tolist()[: len(renderer.prompt_ids(chat(*turns)))]
        == renderer.prompt_ids(chat(*turns))
        == inference_ids(tokenizer, chat(*turns).prompt)
    )
    assert spans(tokenizer, Renderer(tokenizer).sequences(chat("what", "thought#yes"))[0]) == ["thought#yes<|im_end|>"]


def test_tokenizer_without_a_template(tokenizer):
    tokenizer.chat_template = None
    for call in (Renderer(tokenizer).sequences, Renderer(tokenizer).prompt_ids):
        with pytest.raises(ConfigError, match="no chat template") as caught:
            call(chat("what", "yes"))
        assert "model.template=chatml|alpaca|plain" in caught.value.todo
    assert Renderer(tokenizer).sequences(Record(0, "text", text="texts need none"))


def test_templates_by_name_and_file(tokenizer, tmp_path):
    before = tokenizer_fingerprint(tokenizer)
    apply_template(tokenizer, None)
    assert tokenizer_fingerprint(tokenizer) == before
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    apply_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer_fingerprint(tokenizer) != before
    assert spans(tokenizer, Renderer(tokenizer).sequences(chat("what", "yes"))[0]) == ["yes<|im_end|>"]
    with pytest.raises(ConfigError, match="chatlm") as caught:
        apply_template(tokenizer, "chatlm")
    assert "chatml" in caught.value.todo
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(ConfigError, match="not valid jinja"):
        apply_template(tokenizer, str(tmp_path / "broken.jinja"))


def test_template_that_refuses_a_conversation(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="no system role") as caught:
        Renderer(tokenizer).sequences(chat("what", "yes"), "rows.jsonl:1")
    assert caught.value.where == "rows.jsonl:1"


def test_response_without_end_of_turn_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(ConfigError, match="without an end-of-turn") as caught:
        assert Renderer(tokenizer).end_of_turn
    assert "model.template" in caught.value.todo
    with pytest.raises(DataError, match="without its end of turn"):
        Renderer(tokenizer).sequences(chat("what", "yes"))


def test_generation_prompt_that_is_no_beginning_of_a_turn(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
    with pytest.raises(ConfigError, match="generation prompt is not how"):
        Renderer(tokenizer).sequences(chat("what", "yes"))


def test_template_cannot_see_the_clock(tokenizer):
    tokenizer.chat_template = (
        "{{ strftime_now('%d %B %Y') }} {% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    assert tokenizer.decode(Renderer(tokenizer).prompt_ids(chat("what", "yes"))) == "26 July 2024 what<|im_end|>"


def with_bos(tokenizer, added: bool):
    from tokenizers import processors

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if added:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    return tokenizer


def test_double_bos_is_refused(tokenizer):
    with_bos(tokenizer, added=True)
    tokenizer.chat_template = "{{ bos_token }}" + FORGETFUL
    ids = Renderer(tokenizer).sequences(chat("what", "yes"))[0].input_ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1  # the template writes it, so the tokenizer must not add one
    tokenizer.chat_template = "{{ bos_token + bos_token }}" + FORGETFUL
    with pytest.raises(DataError, match="begins with <s> twice"):
        Renderer(tokenizer).sequences(chat("what", "yes"))


def test_double_bos_in_a_text(tokenizer):
    with_bos(tokenizer, added=True)
    assert Renderer(tokenizer).sequences(Record(0, "text", text="the fox"))[0].input_ids[0] == tokenizer.bos_token_id
    with pytest.raises(DataError, match="its text begins with one"):
        Renderer(tokenizer).sequences(Record(0, "text", text="<s>the fox"))


def test_tokenizer_that_marks_the_beginning_of_a_text(tmp_path):
    """With SentencePiece's word marks the response's tokens are those of the whole text: no stray mark where segments meet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = list("abcdefghijklmnopqrstuvwxyz[]/INST")
    vocab = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        *[(letter, -5.0) for letter in dict.fromkeys(letters)],
        ("▁", -4.0),
        ("▁yes", -2.0),
        ("▁what", -2.0),
        ("yes", -3.0),
    ]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = LLAMA2
    sequence = Renderer(tokenizer).sequences(chat("what", "yes"))[0]
    whole = tokenizer("<s>[INST] what [/INST] yes </s>", add_special_tokens=False)["input_ids"]
    assert sequence.input_ids.tolist() == whole
    assert tokenizer.convert_ids_to_tokens(sequence.input_ids[sequence.loss_weight > 0]) == ["▁yes", "▁", "</s>"]


@pytest.mark.slow
def test_real_tokenizer():
    from transformers import AutoTokenizer

    from ftrun.models.demo import smollm2_135m

    tokenizer = AutoTokenizer.from_pretrained(smollm2_135m())
    record = chat("What is 1 plus 2?", "  Three.\n\nSure: ünïcödé 🙂 ", "And 3?", "\nSix")
    sequence = Renderer(tokenizer).sequences(record)[0]
    assert spans(tokenizer, sequence) == ["  Three.\n\nSure: ünïcödé 🙂 <|im_end|>", "\nSix<|im_end|>"]
    turns = [{"role": message.role, "content": message.content} for message in record.messages]
    assert tokenizer.decode(sequence.input_ids) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_fingerprint_ignores_switches_of_the_last_call(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["what", "what is 1 plus"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["more"])
    assert tokenizer_fingerprint(tokenizer) != before
    assert json.dumps(before)
