"""Weights from entropies against plain numpy, and what a step may not depend on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import ftrun
from ftrun.data.batches import micro_batches
from ftrun.errors import ConfigError
from ftrun.objectives.sft import Sft
from ftrun.tokens.policies.entropy_weighting import EntropyWeighting
from ftrun.tokens.step_ranking import kept_count
from ftrun.training.view import StepView

FORMS = [
    {"form": "top", "share": 0.2},
    {"form": "top", "share": 0.71},
    {"form": "up"},
    {"form": "up", "strength": 2.5},
    {"form": "down"},
    {"form": "down", "strength": 0.3},
]


@pytest.fixture
def sharp(bundle):
    """Larger embeddings than a fresh model has: its predictions then differ from each other."""
    with torch.no_grad():
        bundle.model.get_input_embeddings().weight.mul_(40)
    return bundle


@pytest.fixture
def views(sharp, table):
    def make(batch_tokens: int = 60, packing: bool = False, order=None) -> list[StepView]:
        drawn = np.arange(len(table)) if order is None else np.array(order)
        batches = micro_batches(table, drawn, batch_tokens, packing, sharp.pad_id)
        return [StepView(sharp.model, sharp.architecture, batch) for batch in batches]

    return make


@pytest.fixture
def entropies(sharp, table) -> dict[int, np.ndarray]:
    """Entropies at the trained tokens of every row, by a loop at batch size 1."""
    found = {}
    for row in range(len(table)):
        item = table.sequence(row)
        with torch.no_grad():
            logits = sharp.model(torch.tensor(item.input_ids.tolist())[None]).logits[0, :-1].double().numpy()
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        found[row] = -(p * np.log(np.maximum(p, 1e-300))).sum(1)[item.loss_weight[1:] > 0]
    return found


def step(policy: EntropyWeighting, views: list[StepView]) -> dict[int, np.ndarray]:
    """Factors of the trained tokens of every row, as the loop gets them."""
    everything = torch.cat([policy.statistic(view) for view in views])
    assert not everything.requires_grad
    factors = {}
    for view in views:
        view.step_statistics = everything
        weighed = policy.weigh(view)
        assert not weighed.requires_grad and weighed.dtype == view.token_nll.dtype
        for number, row in enumerate(view.batch.table_index.tolist()):
            factors[row] = weighed[view.batch.target_sequence == number].numpy()
    return factors


def expected(entropies: dict[int, np.ndarray], form: str, share: float = 0.2, strength: float = 1.0):
    flat = np.concatenate([entropies[row] for row in sorted(entropies)])
    if form == "top":
        raw = np.zeros(len(flat))
        raw[np.argsort(-flat, kind="stable")[: math.ceil(share * len(flat))]] = 1
    else:
        raw = (1 + flat) ** (strength if form == "up" else -strength)
    return raw / raw.mean()


@pytest.mark.parametrize("knobs", FORMS)
@pytest.mark.parametrize(("batch_tokens", "packing"), [(10_000, False), (60, False), (1, False), (10_000, True)])
def test_weights_follow_the_formula_however_the_step_is_cut(knobs, batch_tokens, packing, views, entropies):
    factors = step(EntropyWeighting(**knobs), views(batch_tokens, packing))
    found = np.concatenate([factors[row] for row in sorted(factors)])
    np.testing.assert_allclose(found, expected(entropies, **knobs), rtol=1e-4)
    assert found.mean() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "knobs", [{"form": "top", "share": 1.0}, {"form": "up", "strength": 0.0}, {"form": "down", "strength": 0.0}]
)
def test_plain_training_is_the_limit(knobs, views):
    assert all((values == 1).all() for values in step(EntropyWeighting(**knobs), views()).values())


def test_up_and_down_mean_what_they_say(views, entropies):
    flat = np.concatenate([entropies[row] for row in sorted(entropies)])
    for form, sign in (("up", 1), ("down", -1)):
        factors = step(EntropyWeighting(form=form), views())
        found = np.concatenate([factors[row] for row in sorted(factors)])
        assert np.corrcoef(flat, found)[0, 1] * sign > 0.9


def test_a_micro_batch_without_kept_tokens_has_no_loss_and_no_gradient(views, sharp):
    policy, made = EntropyWeighting(share=0.02), views(1)
    step(policy, made)
    empty = [view for view in made if not policy.weigh(view).any()]
    assert empty
    for view in empty:
        view.factors = policy.weigh(view)
        loss = Sft().loss(view).value
        assert loss == 0
        loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in sharp.model.parameters())


def test_copies_of_a_row_share_their_fate(views):
    policy = EntropyWeighting(share=0.3)
    once, made = step(policy, views()), views(1, order=[*range(12), 3])
    everything = torch.cat([policy.statistic(view) for view in made])
    twins = []
    for view in made:
        view.step_statistics = everything
        if view.batch.table_index.tolist() == [3]:
            twins.append(policy.weigh(view).numpy())
    assert len(twins) == 2 and (twins[0] == twins[1]).all() and len(twins[0]) == len(once[3])


def test_kept_count_rounds_up():
    assert [kept_count(*of) for of in ((0.2, 1), (0.55, 100), (0.6, 5), (1.0, 7), (0.5, 0))] == [1, 55, 3, 7, 0]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"share": 0.0}, "share above 0"),
        ({"share": 1.2}, "share above 0"),
        ({"strength": -1.0}, "must not be negative"),
        ({"strength": math.inf}, "must not be negative"),
    ],
)
def test_bad_knobs_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        EntropyWeighting(**knobs)


def words(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[str]:
    quick = ["eval=[]", "data.heldout=0", "data.max_length=256", "train.batch_size=8", "train.max_steps=3"]
    given = ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", "tokens=entropy_weighting"]
    return [*given, *quick, *more]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_cut(tiny_dir, rows_file, tmp_path):
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "whole", "train.packing=false"))
    for cut in ("train.batch_tokens=1", "train.packing=true"):
        ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / cut, cut))
        np.testing.assert_allclose(
            losses(tmp_path / "whole"), losses(tmp_path / cut), rtol=1e-5, atol=1e-5, err_msg=cut
        )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["top", "up"])
def test_two_processes_train_what_one_trains(form, tiny_dir, rows_file, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        more = (f"tokens.form={form}", "launch.threads=1", f"launch.processes={processes}")
        overrides = words(tiny_dir, rows_file, tmp_path / out, *more)
        ftrun.run("train", overrides=overrides)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5, atol=1e-5)
