"""A short part of the fuzzing that scripts/fuzz.py does at length, and the faults that it found, each by its kind."""

from __future__ import annotations

import json
import sys

import pytest

from ftrun import cli, registry
from ftrun.config import compose, plain_yaml, recipes
from ftrun.config.settings import DataConfig
from ftrun.data.pool import load_pool
from ftrun.errors import ConfigError, DataError

sys.path.insert(0, str(registry.PACKAGE.parent / "scripts"))
import fuzz


def test_a_short_campaign():
    """No line or file is wrong: each is accepted as it is, or refused in one clear line with its own exit code."""
    found = fuzz.campaign(lines=24, files=120, seed=7)
    assert [one for one in found if one.result == "wrong"] == []
    assert {one.result for one in found} == {"valid", "refused"}


BOMB = "a: &a [x, x]\n" + "".join(
    f"b{at}: &b{at} [{', '.join(['*b' + str(at - 1) if at else '*a'] * 9)}]\n" for at in range(12)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested deeper"),
        ("a: " + "{a: " * 50_000, "nested deeper"),
        ("- " * 5000 + "a", "nested deeper"),
        (BOMB, "more than"),
        ("\n".join(f"k{at}: 1" for at in range(100_000)), "more than"),
        ("data: &a\n  columns: *a", "a part of"),
        ("data: &a [*a]", "a part of"),
        ("data: !!set {a, b}", "stands for more than plain values"),
        ("data: !!binary aGk=", "stands for more than plain values"),
        ("seed: !!int x", "is not valid YAML"),
        ("train: {<<: 3}", "merging"),
        ("on: 1", "is no name"),
        ("seed: ???", "leaves a value open"),
        ("data: {system: '${oc.env:HOME}'}", "may only name keys"),
        ("data: {system: '${${a}:HOME}'}", "may only name keys"),
        ("data: {system: '${'}", "cannot be read"),
        ("model: {trust_remote_code: true}", "trust_remote_code"),
        ("eval: {lm_eval: {include_path: tasks}}", "can hold code"),
        ("eval: {lm_eval: {tasks: [./a.yaml]}}", "can hold code"),
        ("out: ../../x", "holds `out:`"),
        ("run: /tmp", "holds `run:`"),
        ("recipe: lora_sft", "holds `recipe:`"),
        ("eval: {heldout: {_chosen: true}}", "holds `_chosen:`"),
        ("eval: {heldout: 3}", "holds knobs"),
        ("eval: {nope: {rows: 1}}", "has no choice"),
        ("differences: {a: 1}", "takes list of text"),
        ("train: {epochs: {a: 1}}", "takes float"),
        ("defaults: [{override /adapter: [lora, lisa]}]", "one name"),
        ("defaults: [{override /adapter: lora}, {override /adapter: lisa}]", "one name"),
        ("defaults: [{override /model: nope}]", "no choice"),
    ],
)
def test_recipe_files_that_reach_too_far(text, said, tmp_path):
    """Neither a crash of the parser in C, nor minutes, nor what a recipe may not say."""
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        recipes.find(str(file))


def test_yaml_reads_as_it_is_meant(tmp_path):
    """No octal, sexagesimal or date: those are text, and a number's key refuses text. Merge keys and aliases hold."""
    text = "a: 007\nb: 1:30\nc: 2020-01-01\nd: 1e-5\ne: 10_000\nf: &f {x: 1, y: 2}\ng: {<<: *f, y: 3}\n"
    found = plain_yaml.parse("\ufeff" + text, tmp_path)
    assert found == {
        "a": "007",
        "b": "1:30",
        "c": "2020-01-01",
        "d": 1e-5,
        "e": 10_000,
        "f": {"x": 1, "y": 2},
        "g": {"x": 1, "y": 3},
    }


@pytest.mark.parametrize("name", ["inf", "1e5", "true", "a.b", "ä b"])
def test_a_recipe_file_of_any_name(name, tmp_path):
    file = tmp_path / f"{name}.yaml"
    file.write_text("train: {epochs: 3}\n")
    assert compose.load(cli.parse(["train", f"recipe={file}"]).overrides).settings.train.epochs == 3
    (tmp_path / "null.yaml").write_text("train: {epochs: 3}\n")
    with pytest.raises(ConfigError, match="cannot be called null"):
        recipes.find(str(tmp_path / "null.yaml"))


@pytest.mark.parametrize(
    "word",
    [
        "seed=" + "9" * 30,
        "budget=" + "9" * 400,
        "train.max_steps=" + "9" * 5000,
        "out=" + "x" * 300,
        "out=~nobody_/x",
        "run=" + "x" * 5000,
        "run=~nobody_/x",
        "recipe=~nobody_/x.yaml",
        f"recipe={'x' * 300}.yaml",
        "model.path=~nobody_",
    ],
)
def test_numbers_and_places_that_no_machine_takes(word):
    with pytest.raises(ConfigError) as caught:
        compose.load(cli.parse(["train", word]).overrides, "train")
    assert len(str(caught.value)) < 7000 and len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("text", ["", "3", "[1]", "recipe: a", "model: {}\ndata: 3", "a: !!python/name:os.system"])
def test_a_config_that_no_run_has_written(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        compose.load([f"run={tmp_path}"], "eval")


def test_a_number_beyond_all_floats_in_a_row(tmp_path):
    """As a text it is written out; as a weight it is refused."""
    file = tmp_path / "a.jsonl"
    number = 10**400
    file.write_text(json.dumps({"prompt": number, "completion": "a"}) + "\n")
    pool = load_pool(DataConfig(path=str(file)), tmp_path / "work", 0)
    assert pool[0].messages[0].content == str(number)
    file.write_text(json.dumps({"prompt": "q", "completion": "a", "weight": number}) + "\n")
    with pytest.raises(DataError, match="no weight of a loss"):
        load_pool(DataConfig(path=str(file)), tmp_path / "work", 0)
