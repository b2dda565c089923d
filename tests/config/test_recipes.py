"""Recipe files: those we ship, and those that must be refused."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from composed import as_shipped

from ftrun.config import recipes
from ftrun.config.compose import load, load_each, recipe_names
from ftrun.config.grammar import normal_override
from ftrun.config.recipes import FIDELITIES
from ftrun.errors import ConfigError

SHIPPED = sorted(recipes.catalogue())
PLACES = ("model.path", "data.path", "out")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_says_what_it_is(name: str) -> None:
    recipe = recipes.find(name)
    assert recipe.about and recipe.usage, "a head comment with a sentence and commands"
    assert any(f"recipe={name}" in command for command in recipe.usage)
    assert recipe.paper["title"] and recipe.paper["authors"] and isinstance(recipe.paper["year"], int)
    assert recipe.paper.get("arxiv") or recipe.paper.get("url")
    assert recipe.fidelity in FIDELITIES
    assert isinstance(recipe.differences, list) and all(isinstance(line, str) for line in recipe.differences)
    assert recipe.file.read_text().count("differences:") == 1


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_composes_as_written(name: str) -> None:
    composed = as_shipped(name)
    recipe = recipes.find(name)
    assert composed.settings.recipe == name and not composed.notes
    for slot, chosen in recipe.choices.items():
        if slot == "eval":
            assert [one for one, _ in composed.settings.eval] == (chosen if isinstance(chosen, list) else [chosen])
        elif slot in composed.settings.slots:
            assert composed.settings.choice(slot) == chosen
    for slot, block in recipe.blocks.items():
        if slot != "eval":
            own = {key: value for key, value in block.items() if key in composed.settings.slots[slot][1]}
            assert {key: composed.settings.slots[slot][1][key] for key in own} == own


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.slow
def test_the_commands_of_a_shipped_recipe_compose(name: str) -> None:
    """All but those that only say where model and rows are: the recipe alone composes in the test before this one."""
    for command in recipes.find(name).usage:
        program, verb, *overrides = shlex.split(command, comments=True)
        assert program == "ftrun" and verb in ("train", "select", "eval", "preview")
        overrides = [normal_override(word) for word in overrides]
        if verb == "select" and len(recipe_names(overrides)) > 1:
            assert len(load_each(overrides)) > 1
        elif overrides[0] != "-m" and {word.partition("=")[0] for word in overrides} - {*PLACES, "recipe"}:
            load(overrides)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("adapter: {_target_: os.system}", "holds `_target_:`, which a recipe may not"),
        ("train: {x: [{_target_: os.system}]}", "holds `_target_:`, which a recipe may not"),
        ("adapter: {_partial_: true}", "holds `_partial_:`, which a recipe may not"),
        ("hydra: {launcher: {}}", "holds `hydra:`, which a recipe may not"),
        ("defaults: [{override /hydra/launcher: joblib}]", 'there is no slot "hydra/launcher"'),
        ("defaults: [adapter]", "lines `- override /slot: name`"),
        ("defaults: [{adapter: lora}]", "lines `- override /slot: name`"),
        ("defaults: [{override /adaptor: lora}]", 'there is no slot "adaptor"'),
        ("defaults: [{override /adapter: loar}]", 'adapter has no choice "loar"'),
        ("adapter: lora", "`adapter:` holds knobs, not 'lora'"),
        ("paper: LoRA", "`paper:` holds knobs, not 'LoRA'"),
        ("- a\n- b", "is not a recipe"),
        ("train: {epochs: 1", "is not valid YAML"),
        ("train: {epochs: 1}\ntrain: {epochs: 2}", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not valid YAML"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load([f"recipe={file}"])
    assert what in error.value.what and str(file) in error.value.what


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        recipes.read(file)


def test_folders_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text("# Own.\ntrain: {epochs: 3}\n")
    (tmp_path / "sft.yaml").write_text("# Another sft.\ntrain: {epochs: 4}\n")
    monkeypatch.setenv("FTRUN_RECIPES", str(tmp_path))
    assert load(["recipe=own"]).settings.train.epochs == 3.0
    assert load(["recipe=sft"]).settings.train.epochs == 4.0  # a later folder wins
    monkeypatch.setenv("FTRUN_RECIPES", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="there is no recipe folder"):
        recipes.catalogue()


def test_what_a_recipe_sets() -> None:
    recipe = recipes.find("qlora_sft")
    assert recipe.sets("adapter.r") and recipe.sets("train.batch_size") and recipe.sets("fidelity")
    assert not recipe.sets("adapter.bias") and recipe.sets("train") is not False and not recipe.sets("seed")
