"""Words from other trainers: each gets words to type that work."""

from __future__ import annotations

import shlex

import pytest

from ftrun import cli, registry
from ftrun.config import compose, recipes
from ftrun.config.cluster import is_cluster_word
from ftrun.config.words import CHOICES, KEYS, SWITCHES, our_choice, our_words
from ftrun.reporting.manual import PAGES, describe_key


@pytest.fixture(scope="module")
def knobs():
    return compose.load(["recipe=lora_sft"]).settings.as_dict()


def test_every_key_that_is_named_exists(knobs):
    for key in KEYS:
        section, _, name = key.partition(".")
        assert name in knobs[section] if name else section in {**knobs, "recipe": ""}, key


def test_every_choice_that_is_named_exists(knobs):
    for words in [*(words for table in CHOICES.values() for words in table), *SWITCHES.values()]:
        for key, _, value in (word.partition("=") for word in shlex.split(words)):
            if key in registry.SLOTS:
                assert value == "[]" or registry.find(key, value.strip("[]"))
            else:
                section, _, name = key.partition(".")
                assert name in knobs[section] if name else recipes.find(value)


def test_no_word_stands_for_two_things():
    words = " ".join(KEYS.values()).split()
    assert len(words) == len(set(words)) and not set(words) & set(SWITCHES)


@pytest.mark.parametrize(
    ("key", "value", "ours"),
    [
        ("lr", "1e-4", "optim.learning_rate=1e-4"),
        ("train.lr", "1e-4", "optim.learning_rate=1e-4"),
        ("num_train_epochs", "3", "train.epochs=3"),
        ("per-device-train-batch-size", "4", "train.batch_size=4"),
        ("adapter.alpha", "8", "adapter.lora_alpha=8"),
        ("tokens.alpha", "8", None),
        ("quantization", "4bit", "quant=nf4"),
        ("load_in_4bit", "true", "quant=nf4"),
        ("wholly_unknown", "1", None),
    ],
)
def test_keys_of_other_trainers(key, value, ours):
    assert our_words(key, value) == ours


@pytest.mark.parametrize(
    ("slot", "name", "ours"),
    [
        ("adapter", "neftune", "tokens=neftune"),
        ("tokens", "superfiltering", "select=superfiltering"),
        ("adapter", "tshirt", "select=tshirt"),
        ("quant", "qlora_sft", "recipe=qlora_sft"),
    ],
)
def test_choices_of_another_slot(slot, name, ours):
    assert our_choice(slot, name) == ours


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train lora_sft", "recipe=lora_sft"),
        ("train --recipe lora_sft", "recipe=lora_sft"),
        ("train --recipe=lora_sft", "recipe=lora_sft"),
        ("train recipe=lora_sft --data.path=x", "data.path=x"),
        ("train --learning-rate 1e-4", "optim.learning_rate=1e-4"),
        ("train recipe = lora_sft", "spaces around an ="),
        ("train my.jsonl", "data.path=my.jsonl"),
        ("train ./mine.yaml", "recipe=./mine.yaml"),
        ("train lora", "adapter=lora"),
        ("train recipe=lora_sft --jsno", '"--json"'),
        ("merge RUN", "ftrun merge run=RUN"),
        ("train recipe=lora_sft lr=1e-4", "optim.learning_rate=1e-4"),
        ("train recipe=lora_sft +lr=1e-4", "optim.learning_rate="),
        ("train recipe=lora_sft gradient_accumulation_steps=4", "train.batch_size"),
        ("train recipe=lora_sft adapter=dora", "adapter.use_dora=true, or recipe=dora_sft"),
        ("train recipe=lora_sft adapter=qlora", "adapter=lora quant=nf4, or recipe=qlora_sft"),
        ("train recipe=lora_sft quant=0", "quant=none"),
        ("train recipe=lora_sft schedule=null", "schedule=constant"),
        ("train recipe=lora_sft +eval=0.1", 'eval has no choice "0.1"'),
        ("train recipe=lora_sft adapter=[lora]", "adapter=lora"),
        ("eval model.path=M eval=mmlu", "'eval=[lm_eval]' 'eval.lm_eval.tasks=[mmlu]'"),
        ("eval model.path=M eval=[mmlu]", "'eval=[lm_eval]' 'eval.lm_eval.tasks=[mmlu]'"),
        ("recipes lora --slot", "--slot takes a value"),
    ],
)
def test_a_newcomer_is_told_what_to_type(line, told, capsys):
    assert cli.entry(line.split()) == 2
    assert told in capsys.readouterr().err


def test_show_takes_a_name(monkeypatch):
    shown = []
    monkeypatch.setattr(cli, "execute", lambda verb, composed, line: shown.append(composed.settings.recipe))
    assert cli.entry(["show", "tshirt"]) == 0 and shown == ["tshirt"]


@pytest.mark.parametrize("verb", PAGES)
def test_the_page_of_a_verb(verb, capsys):
    """It names keys that exist, with their meaning, and its examples are command lines that compose."""
    assert cli.entry([verb, "--help"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    for key in PAGES[verb].keys:
        assert key in printed and describe_key(key)[0], key
    for example in PAGES[verb].examples:
        name, *words = shlex.split(example.removeprefix("ftrun "))
        line = cli.parse([name, *words])
        if name == "submit":
            assert line.rest.pop() == "train"
        own = [word for word in line.overrides if not is_cluster_word(word) and "," not in word]
        plain = name in cli.PLAIN_VERBS or name in ("status", "cancel")
        if not plain and "explain" not in line.rest and "," not in str(line.overrides[:1]):
            compose.load([*own, *(f"recipe={rest}" for rest in line.rest)])


def test_help_lists_every_verb(capsys):
    assert cli.entry(["--help"]) == 0
    printed = capsys.readouterr().out
    assert set(PAGES) == set(cli.VERBS)
    assert all(f"ftrun {verb}" in printed for verb in PAGES)
    assert max(map(len, printed.splitlines())) <= 80
    assert cli.entry(["help", "trian"]) == 2
