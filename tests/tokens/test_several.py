"""Several token policies at once: what is multiplied, what only one may do, and how they are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ftrun
from ftrun import registry
from ftrun.config.compose import load
from ftrun.config.saved import settings_from
from ftrun.data.batches import micro_batches
from ftrun.errors import ConfigError
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.q_tuning import QTuning
from ftrun.tokens.several import Several
from ftrun.tokens.talr import Talr
from ftrun.training.view import StepView


class Editor(TokenPolicy):
    name, edits = "editor", True


class Arranger(TokenPolicy):
    name, arranges, packs = "arranger", True, False


def test_factors_are_multiplied_and_each_gets_its_own_statistics(bundle, table):
    first, second = Talr(), QTuning(r_sample=0.5)
    together = Several([first, second])
    assert together.dynamic and together.whole_step and together.packs and not together.static
    batches = list(micro_batches(table, np.arange(len(table)), 60, False, bundle.pad_id))
    views = [StepView(bundle.model, bundle.architecture, batch) for batch in batches]
    with torch.no_grad():
        joint = torch.cat([together.statistic(view) for view in views])
        alone = [torch.cat([policy.statistic(view) for view in views]) for policy in (first, second)]
        for view in views:
            view.step_statistics = joint
            product = together.weigh(view)
            assert view.step_statistics is joint
            expected = []
            for policy, statistics in zip((first, second), alone, strict=True):
                view.step_statistics = statistics
                expected.append(policy.weigh(view))
            torch.testing.assert_close(product, expected[0] * expected[1])


@pytest.mark.parametrize("pair", [[Editor(), Editor()], [Arranger(), Arranger()]])
def test_only_one_may_change_rows_or_batches(pair):
    with pytest.raises(ConfigError, match="both"):
        Several(pair)
    assert not Several([pair[0], Talr()]).packs or isinstance(pair[0], Editor)


def test_a_list_is_composed_and_read_back():
    settings = load(["tokens=[neftune,talr]", "tokens.talr.tau=2", "tokens.from=runs/x"]).settings
    assert settings.slots["tokens"] == (
        "neftune+talr",
        {"neftune": {"alpha": 5.0}, "talr": {"tau": 2.0, "minimum_weight": 0.01, "normalize": "tokens"}},
    )
    again = settings_from(json.loads(json.dumps(settings.as_dict())))
    assert again.slots["tokens"] == settings.slots["tokens"] and again.tokens.from_run == "runs/x"
    made = again.component("tokens")
    assert [policy.name for policy in made.policies] == ["neftune", "talr"] and made.policies[1].tau == 2.0


def test_values_of_the_recipe_stay_with_its_method():
    composed = load(["recipe=token_cleaning", "tokens=[token_cleaning,talr]"])
    recipe = load(["recipe=token_cleaning"]).settings
    assert composed.settings.slots["tokens"][1]["token_cleaning"] == recipe.slots["tokens"][1]
    assert not composed.notes


def test_a_recipe_may_name_several(tmp_path):
    file = tmp_path / "both.yaml"
    file.write_text("defaults:\n  - override /tokens: [neftune, talr]\ntokens: {talr: {tau: 3.0}}\n")
    knobs = load([f"recipe={file}"]).settings.slots["tokens"][1]
    assert knobs["talr"]["tau"] == 3.0 and knobs["neftune"]["alpha"] == 5.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokens=[talr,talr]"], "twice"),
        (["tokens=[talr,tlr]"], 'no choice "tlr"'),
        (["tokens=[neftune,talr]", "tokens.tau=2"], "tokens.tau"),
        (["tokens=[neftune,talr]", "tokens.talr.tua=2"], "tua"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        load(words)


def test_one_in_brackets_is_that_one():
    assert load(["tokens=[talr]"]).settings.choice("tokens") == "talr"
    assert not registry.find("tokens", "talr").parts


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_neutral_partner_changes_nothing(tiny_dir, rows_file, tmp_path):
    def run(out: str, *more: str) -> list[float]:
        quick = ["data.heldout=0", "data.max_length=256", "train.batch_size=4", "train.max_steps=3", "eval=[]"]
        words = ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={tmp_path / out}"]
        ftrun.run("train", overrides=[*words, *quick, *more])
        return losses(tmp_path / out)

    alone = run("alone", "tokens=talr")
    assert run("both", "tokens=[neftune,talr]", "tokens.neftune.alpha=0") == pytest.approx(alone, rel=1e-6)
    assert run("noisy", "tokens=[neftune,talr]", "tokens.neftune.alpha=50") != pytest.approx(alone, rel=1e-4)


def test_registers_take_no_weights_of_others():
    """What mutor puts between the tokens is no text: only methods that weigh before training go with it."""
    from ftrun.tokens.mutor import Mutor
    from ftrun.tokens.token_cleaning import TokenCleaning

    with pytest.raises(ConfigError, match="inputs of its own"):
        Several([Mutor(), Talr()])
    assert not Several([TokenCleaning(), Mutor()]).packs
