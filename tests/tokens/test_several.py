"""Several token policies at once: what is multiplied, what only one may do, and how they are asked for."""

from __future__ import annotations

import json
import statistics
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
from ftrun.objectives.sft import Sft
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.policies.q_tuning import QTuning
from ftrun.tokens.policies.talr import Talr
from ftrun.tokens.run import run_tokens
from ftrun.tokens.several import Several
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


def test_static_weights_multiply_dynamic_ones(table, reference_dir, context, make_views, factors_of, plain_losses):
    """Cleaning, then TALR over what it keeps, in plain numpy."""
    from transformers import AutoModelForCausalLM

    knobs = {"token_cleaning": {"reference": str(reference_dir), "k": 0.5}, "talr": {}}
    ctx = context("token_cleaning+talr", knobs)
    policy = ctx.settings.component("tokens")
    views = make_views(run_tokens(policy, table, ctx))
    factors_of(policy, views)
    found = sum(float(Sft().loss(view).value.detach()) for view in views) / sum(
        Sft().count(view.batch) for view in views
    )

    nll = plain_losses(table)
    reference = plain_losses(table, AutoModelForCausalLM.from_pretrained(reference_dir).eval())
    score = np.concatenate([nll[row] - reference[row] for row in nll])
    kept = np.zeros(len(score), bool)
    kept[np.argsort(-score, kind="stable")[: int(0.5 * len(score))]] = True
    rows = np.split(kept, np.cumsum([len(row) for row in nll.values()])[:-1])
    left = [losses[mine] for losses, mine in zip(nll.values(), rows, strict=True) if mine.any()]
    tau = statistics.median_low([float(losses.mean()) for losses in left])
    flat = np.concatenate(left)
    expected = (np.maximum(np.maximum(np.exp(-flat), 1e-6) ** (1 / tau), 0.01) * flat).mean()
    assert found == pytest.approx(expected, rel=1e-4)


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
    from ftrun.tokens.policies.mutor import Mutor
    from ftrun.tokens.policies.token_cleaning import TokenCleaning

    with pytest.raises(ConfigError, match="inputs of its own"):
        Several([Mutor(), Talr()])
    assert not Several([TokenCleaning(), Mutor()]).packs
