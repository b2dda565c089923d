"""Forgetting: its two sets and its loss against plain arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ftrun
from ftrun.config.compose import load
from ftrun.errors import ConfigError
from ftrun.objectives.sft import Sft
from ftrun.tokens.policies.forgetting_sft import ForgettingSft, signs
from ftrun.tokens.policies.token_cleaning import highest


@pytest.fixture
def signed(table):
    """The table with a sign for every trained token, in a fixed random order."""
    scores = np.where(
        np.asarray(table.loss_weight) > 0, np.random.default_rng(0).normal(size=len(table.input_ids)), np.nan
    )
    found = signs(scores, 0.7)
    return table.with_weights(np.where(np.isnan(found), 0, table.loss_weight)).with_remembered({"sign": found})


def test_the_two_sets_follow_the_ranking():
    scores = np.array([np.nan, 0.5, 3.0, 2.0, np.nan, 2.0, -1.0, 0.0, 9.0])
    found = signs(scores, 0.6)  # of 7: the 4 highest, the next 2
    np.testing.assert_array_equal(found, [np.nan, -1, 1, 1, np.nan, 1, np.nan, -1, 1])
    assert (found == 1).tolist() == highest(scores, 0.6).tolist()
    assert np.isnan(found).sum() == 2 + 1  # one is in neither set


@pytest.mark.parametrize("rho", [0.1, 0.3, 0.7, 1.0])
def test_counts_are_rounded_down(rho):
    found = signs(np.random.default_rng(1).normal(size=997), rho)
    assert (found == 1).sum() == int(rho * 997) and (found == -1).sum() == int((1 - rho) * 997)


def expected_loss(table, losses, weight) -> float:
    nll = np.concatenate([losses[row] for row in range(len(table))])
    weights = np.asarray(table.loss_weight).copy()
    weights[table.offsets[:-1]] = 0
    sign = table.remembered["sign"][weights > 0]
    return nll[sign > 0].mean() - weight * nll[sign < 0].mean()


@pytest.mark.parametrize("cut", [{"batch_tokens": 1}, {"batch_tokens": 64}, {"batch_tokens": 64, "packing": True}])
@pytest.mark.parametrize("step", [0, 3, 9])
def test_the_loss_is_the_papers(cut, step, signed, make_views, factors_of, plain_losses):
    """However the step is cut, packed rows included."""
    policy = ForgettingSft(lambda_max=0.5, lambda_min=0.1)
    views = make_views(signed, **cut, step=step, steps=10)
    factors_of(policy, views)
    value = sum(float(Sft().loss(view).value.detach()) for view in views)
    count = sum(Sft().count(view.batch) for view in views)
    weight = 0.4 * step / 10
    assert value / count == pytest.approx(expected_loss(signed, plain_losses(signed), weight), rel=1e-4)
    parts = {name: sum(float(view.parts[name]) for view in views) / count for name in views[0].parts}
    assert parts["lambda"] == pytest.approx(weight)
    assert parts["learned_nll"] - weight * parts["forgotten_nll"] == pytest.approx(value / count, rel=1e-4)


def test_the_ramp_starts_at_zero_and_ends_below_its_end():
    policy = ForgettingSft()
    ramp = [policy.ramp(step, 100) for step in range(100)]
    assert ramp[0] == 0 and np.all(np.diff(ramp) > 0)
    assert ramp[-1] == pytest.approx((0.25 - 1e-5) * 0.99)


def test_forgetting_turns_the_gradient_around(signed, bundle, make_views, factors_of):
    """With nothing but negatives in a step, the gradient points away from that of plain training."""
    gradients = []
    for forget in (False, True):
        negatives = np.where(signed.remembered["sign"] < 0, signed.loss_weight, 0)
        (view,) = make_views(signed.with_weights(negatives), 10_000, step=1, steps=2)
        if forget:
            factors_of(ForgettingSft(lambda_max=1.0, lambda_min=0.0), [view])
        bundle.model.zero_grad()
        Sft().loss(view).value.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in bundle.model.parameters() if p.grad is not None]))
    plain, turned = gradients
    torch.testing.assert_close(turned, -0.5 * plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_of_one_set_is_finite(sign, signed, make_views, factors_of):
    weights = np.where(signed.remembered["sign"] == sign, signed.loss_weight, 0)
    views = make_views(signed.with_weights(weights), 40, step=0, steps=2)
    factors = factors_of(ForgettingSft(), views)
    assert all(np.isfinite(values).all() for values in factors.values())
    total = sum(float(Sft().loss(view).value.detach()) for view in views)
    assert total > 0 if sign == 1 else total == 0  # at step 0 nothing is forgotten yet


@pytest.mark.parametrize("knobs", [{"rho": 0}, {"rho": 1.1}, {"lambda_min": 0.5}, {"lambda_min": -0.1}])
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        ForgettingSft(**knobs)


def test_only_token_losses_can_be_turned():
    with pytest.raises(ConfigError, match="turns the loss of single tokens around"):
        load(["objective=dpo", "tokens=forgetting_sft"])


# ---- through the loop ----

AUTO = ["tokens.reference=auto", "tokens.reference_learning_rate=1e-2"]
QUICK = ["eval=[]", "data.heldout=0", "train.batch_size=8", "train.max_steps=3", "optim.learning_rate=1e-3"]


def words(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[str]:
    return ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *QUICK, *more, *AUTO]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train/metrics.jsonl").read_text().splitlines()]


def test_without_forgetting_it_is_token_cleaning(tiny_dir, rows_file, tmp_path):
    more = ("tokens=forgetting_sft", "tokens.lambda_max=0", "tokens.lambda_min=0")
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "a", *more))
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "b", "tokens=token_cleaning", "tokens.k=0.7"))
    np.testing.assert_allclose(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny_dir, reference_dir, rows_file, tmp_path, monkeypatch):
    """The reference is given: one that is made on the way has dropout, which each process draws for itself."""
    for out, processes in (("one", 1), ("two", 2)):
        monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / f"cache-{out}"))
        more = ("tokens=forgetting_sft", "tokens.lambda_max=1", "launch.threads=1", f"launch.processes={processes}")
        overrides = [*words(tiny_dir, rows_file, tmp_path / out, *more), f"tokens.reference={reference_dir}"]
        ftrun.run("train", overrides=overrides)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-4, atol=1e-4)
