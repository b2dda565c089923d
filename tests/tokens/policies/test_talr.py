"""TALR against its formula, and its statistics of the whole step."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
import torch

import ftrun
from ftrun.config.compose import load
from ftrun.data.batches import micro_batches
from ftrun.errors import ConfigError
from ftrun.tokens.policies.talr import Talr
from ftrun.training.view import StepView


@pytest.fixture
def views(bundle, table):
    """All rows as one optimiser step of several micro-batches."""

    def make(batch_tokens: int = 64) -> list[StepView]:
        batches = micro_batches(table, np.arange(len(table)), batch_tokens, False, bundle.pad_id)
        return [StepView(bundle.model, bundle.architecture, batch) for batch in batches]

    return make


def step(policy: Talr, views: list[StepView]) -> dict[int, torch.Tensor]:
    """Factors of every row, as the loop gets them."""
    everything = torch.cat([policy.statistic(view) for view in views])
    factors: dict[int, torch.Tensor] = {}
    for view in views:
        view.step_statistics = everything
        weighed = policy.weigh(view)
        assert not weighed.requires_grad
        for number, row in enumerate(view.batch.table_index.tolist()):
            factors[row] = weighed[view.batch.target_sequence == number]
    return factors


@pytest.fixture
def losses(bundle, table) -> dict[int, np.ndarray]:
    """Losses of the trained tokens of every row, by a loop at batch size 1."""
    found = {}
    for row in range(len(table)):
        item = table.sequence(row)
        ids = torch.tensor(item.input_ids.tolist())
        with torch.no_grad():
            logits = bundle.model(ids[None]).logits[0, :-1].double()
        nll = -torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]].numpy()
        found[row] = nll[item.loss_weight[1:] > 0]
    return found


def test_weights_follow_the_formula(views, losses):
    tau = statistics.median_low([float(nll.mean()) for nll in losses.values()])
    factors = step(Talr(), views())
    for row, nll in losses.items():
        expected = np.maximum(np.maximum(np.exp(-nll), 1e-6) ** (1 / tau), 0.01)
        np.testing.assert_allclose(factors[row].numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("normalize", ["tokens", "simplex"])
def test_the_cut_into_micro_batches_does_not_matter(views, normalize):
    whole, cut = step(Talr(normalize=normalize), views(10_000)), step(Talr(normalize=normalize), views(1))
    for row, factors in whole.items():
        torch.testing.assert_close(factors, cut[row], rtol=1e-4, atol=1e-6)


def test_simplex_divides_by_the_sum_of_the_weights(views, losses):
    plain, simplex = (torch.cat(list(step(Talr(normalize=kind), views()).values())) for kind in ("tokens", "simplex"))
    torch.testing.assert_close(simplex, plain * len(plain) / plain.sum(), rtol=1e-5, atol=1e-7)
    assert simplex.mean() == pytest.approx(1, abs=1e-5)


def test_a_fixed_tau_ignores_the_step(views, losses):
    factors = step(Talr(tau=2.0, minimum_weight=0.0), views())
    np.testing.assert_allclose(factors[0].numpy(), np.exp(-losses[0] / 2), rtol=1e-4)


def test_weights_rise_with_probability_between_their_bounds():
    nll = torch.tensor([0.0, 0.1, 1.0, 5.0, 50.0, 1e4])
    weights = Talr().weights(nll, torch.tensor([1.0, 2.0]))
    assert weights[0] == 1
    assert (weights.diff() <= 0).all()
    assert weights.min() == pytest.approx(0.01)


def test_an_endless_tau_is_plain_training():
    torch.testing.assert_close(Talr(tau=1e12).weights(torch.tensor([0.0, 3.0, 90.0]), torch.ones(1)), torch.ones(3))


def test_tau_is_the_lower_middle_and_never_zero():
    nll = torch.tensor([1.0])
    assert Talr().weights(nll, torch.tensor([1.0, 2.0, 4.0, 8.0])) == pytest.approx(math.exp(-1 / 2))
    assert torch.isfinite(Talr().weights(torch.tensor([0.0, 1.0]), torch.zeros(3))).all()


def test_probabilities_have_a_floor():
    weight = Talr(tau=10.0, minimum_weight=0.0).weights(torch.tensor([100.0]), torch.ones(1))
    assert weight.item() == pytest.approx(1e-6 ** (1 / 10), rel=1e-5)


@pytest.mark.parametrize(
    "knobs", [{"tau": 0.0}, {"tau": -1.0}, {"tau": math.nan}, {"minimum_weight": -0.1}, {"minimum_weight": 1.5}]
)
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(ConfigError, match=f"tokens.{next(iter(knobs))}"):
        Talr(**knobs)


def test_only_token_losses_can_be_weighed():
    with pytest.raises(ConfigError, match="weighs the loss of every token"):
        load(["objective=dpo", "tokens=talr"])


@pytest.mark.slow
@pytest.mark.parametrize("normalize", ["tokens", "simplex"])
def test_two_processes_train_what_one_trains(normalize, tiny_dir, rows_file, tmp_path):
    """The median and the sum of the weights are those of all processes."""
    losses = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", "eval=[]"]
        words += ["data.heldout=0", "train.batch_size=8", "train.max_steps=3", "tokens=talr"]
        words += [f"tokens.normalize={normalize}", "launch.threads=1", f"launch.processes={processes}"]
        ftrun.run("train", overrides=words)
        losses.append([json.loads(line)["loss"] for line in (out / "train/metrics.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(*losses, rtol=1e-5, atol=1e-7)
