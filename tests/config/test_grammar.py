"""What a user types arrives as it was meant, or is refused in words that a user understands."""

from __future__ import annotations

import os
import random
import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ftrun import cli
from ftrun.config import compose, explain
from ftrun.config.grammar import normal_override
from ftrun.errors import ConfigError

PARSER = OverridesParser.create()
LIBRARY_WORDS = re.compile(r"Exception|Error\b|Error:|hydra|omegaconf|antlr|lexer|token recognition|Traceback", re.I)


def arrives(word: str):
    """The value as the config holds it; the values of a sweep as a list of lists."""
    override = PARSER.parse_overrides([normal_override(word)])[0]
    if override.is_sweep_override():
        return [list(override.sweep_string_iterator())]
    return OmegaConf.to_container(OmegaConf.create({"seed": 7, "value": override.value()}), resolve=True)["value"]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("run=~/a b", os.path.expanduser("~/a b")),
        ("eval.lm_eval.tasks=[~/a.yaml]", ["~/a.yaml"]),  # left to the checking of the config
        ("model.path=/home/josé/m", "/home/josé/m"),
        ("data.path=/a b/c(1)=x;y&z#!.jsonl", "/a b/c(1)=x;y&z#!.jsonl"),
        ("data.path=100%@x+y.jsonl", "100%@x+y.jsonl"),
        ("data.path='a,b.jsonl'", "a,b.jsonl"),
        ("data.path=it's.jsonl", "it's.jsonl"),
        ("data.path=*.{json,jsonl}", "*.{json,jsonl}"),
        ("data.path=part[1,2].jsonl", "part[1,2].jsonl"),
        ("data.path=[ab]*.jsonl", "[ab]*.jsonl"),
        ("data.path=[a b.jsonl,ñ.jsonl]", ["a b.jsonl", "ñ.jsonl"]),
        ("data.path=`x`", "`x`"),
        ("out=🙂/${seed}", "🙂/7"),
        ("out=1e3", "1e3"),
        ("model.revision=007", "007"),
        ("model.revision=null", None),
        ("data.system=Be kind, please", "Be kind, please"),
        ("data.columns={instruction: Frage ü, output: 'x, y'}", {"instruction": "Frage ü", "output": "x, y"}),
        ("data.columns={a b: c}", {"a b": "c"}),
        ("optim.learning_rate=-1e-4", -1e-4),
        ("train.epochs= 3", 3),
        ("seed=0,1", [["0", "1"]]),
        ("data.path=é.jsonl,b.jsonl", [["'é.jsonl'", "b.jsonl"]]),
        ("seed=range(1,3)", [["1", "2"]]),
        ("adapter.target_modules=[q,v]", ["q", "v"]),
        ("eval=[]", []),
        ("x=", ""),
    ],
)
def test_values_arrive(word, value):
    assert arrives(word) == value
    assert normal_override(normal_override(word)) == normal_override(word)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_any_text_arrives(text):
    """Sentences arrive to the letter, whatever is in them."""
    if text.strip() and text.strip()[0] not in "'\"" and text.strip() != "null":
        assert arrives(f"prompt={text}") == text


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("data.path='a", "a quote stays open"),
        ("data.path=[a,b", "a bracket stays open"),
        ("data.columns={a: b", "a bracket stays open"),
        ("data.path='a'b", "behind a closing quote"),
        ("prompt=a\0b", "NUL"),
        ("data.path=\udcff.jsonl", "not valid UTF-8"),
    ],
)
def test_what_cannot_be_read(word, what):
    with pytest.raises(ConfigError, match=what):
        normal_override(word)


def test_the_home_folder(monkeypatch, tmp_path):
    """``~/`` is the home folder in whatever names files, for sections, components and lists; never in a sentence."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["data.path=[~/a.jsonl,b~/c]", "model.path=~/m", "out=~/o", "data.system=~/x", "eval=[lm_eval]"]
    words += ["eval.lm_eval.include_path=~/tasks", "select.model.path=~/s"]
    found = compose.load([normal_override(word) for word in words]).settings
    assert found.data.path == [f"{tmp_path}/a.jsonl", "b~/c"]
    assert (found.model.path, found.out, found.data.system) == (f"{tmp_path}/m", f"{tmp_path}/o", "~/x")
    assert dict(found.eval)["lm_eval"]["include_path"] == f"{tmp_path}/tasks"
    assert found.select.model_path == f"{tmp_path}/s"


def test_a_recipe_file_with_letters_of_its_own(tmp_path):
    file = tmp_path / "größe 2.yaml"
    file.write_text("defaults:\n  - override /adapter: lora\nadapter: {r: 5}\n")
    assert compose.load([normal_override(f"recipe={file}")]).settings.slots["adapter"][1]["r"] == 5


# ---- three hundred lines that nobody should type ----

KEYS = [
    "recipe",
    "adapter",
    "quant",
    "schedule",
    "optim",
    "eval",
    "tokens",
    "select",
    "picker",
    "select.picker",
    "model",
]
KEYS += ["data", "data.path", "adapter.r", "optim.learning_rate", "train", "train.epochs", "stages", "budget", "seed"]
KEYS += [
    "data.columns",
    "lr",
    "a.b.c",
    "hydra.job",
    "+eval",
    "+x",
    "++seed",
    "~adapter",
    "~seed",
    "adapter@foo",
    "",
    " ",
]
VALUES = [
    "0",
    "null",
    "0.1",
    "true",
    "",
    "lora",
    "lora_sft",
    "[lora]",
    "[]",
    "{}",
    "{a: 1}",
    "[[1]]",
    "'",
    '"a',
    "`ls`",
]
VALUES += [
    "[a",
    "a]",
    "}",
    "${x}",
    "${",
    "a,b",
    "1,2",
    ",",
    "=",
    "é",
    "🙂",
    "\0",
    "\n",
    "\\",
    "a\\",
    "choice(",
    "range(a)",
]
VALUES += [
    "glob(*)",
    "(",
    "~",
    "-1",
    "1e999",
    "nan",
    "inf",
    "[" * 40,
    "a: b",
    "_target_",
    "{_target_: os.system}",
    "null,null",
]
WORDS = ["lora_sft", "=", "x", "-x", "--lr", "--recipe=sft", "---", "--cfg", "-m", "", "~", "~~", "\udcff=1"]


def lines(count: int) -> list[list[str]]:
    draw = random.Random(0)

    def word() -> str:
        return draw.choice(WORDS) if draw.random() < 0.15 else f"{draw.choice(KEYS)}={draw.choice(VALUES)}"

    return [
        [draw.choice(["train", "select", "show", "plan"]), *(word() for _ in range(draw.randint(1, 3)))]
        for _ in range(count)
    ]


def test_three_hundred_random_lines(monkeypatch, capsys):
    """Each composes, or ends with exit code 2 and at most three lines without a word of the libraries beneath.

    Five in six are read only: composing costs a tenth of a second.
    """
    monkeypatch.setattr(cli, "execute", lambda *args, **kwargs: None)
    monkeypatch.setattr(cli, "_through_hydra", lambda line: 0)
    monkeypatch.setattr("ftrun.verbs.run_together", lambda *args: None)
    monkeypatch.setenv("FTRUN_DEBUG", "")
    wrong, load = [], compose.load
    for at, line in enumerate(lines(300)):
        monkeypatch.setattr(compose, "load", load if at % 6 == 0 else lambda words, *rest: explain.parse(words))
        code = cli.entry(line)
        told = capsys.readouterr().err.strip()
        told = told.replace("hydra.job", "")  # typed, and shown again
        if code not in (0, 2) or LIBRARY_WORDS.search(told) or len(told.splitlines()) > 3 or (code and not told):
            wrong.append((line, code, told))
    assert not wrong, "\n\n".join(f"{line!r}\n{code}: {told}" for line, code, told in wrong[:20])
