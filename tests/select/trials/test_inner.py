"""Short trainings inside a selection: what they yield, what they leave untouched, and that they are not done twice."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import ftrun
from ftrun.errors import ConfigError, DataError
from ftrun.models.fast import speed_up
from ftrun.select.trials import inner
from ftrun.select.trials.inner import InnerTraining, by_content, prepared_rows
from ftrun.training.loop import Trainer

LORA = InnerTraining(epochs=3, learning_rate=1e-2, batch_size=5, lora={"r": 4})
FULL = InnerTraining("full", epochs=2, learning_rate=1e-3, batch_size=5)


@pytest.fixture
def ready(context, make_pool, rows, bundle):
    """A context and the tokens of some rows."""
    speed_up(bundle.model)  # as every loaded model is

    def make(order=None, **asked):
        ctx = context(**asked)
        pool = make_pool(rows if order is None else [rows[place] for place in order])
        return ctx, prepared_rows(pool, ctx).table

    return make


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("training", [LORA, FULL])
def test_the_model_is_as_before(training, ready, bundle):
    ctx, table = ready()
    before, modules = weights(bundle.model), [name for name, _ in bundle.model.named_modules()]
    flags = {name: p.requires_grad for name, p in bundle.model.named_parameters()}
    losses = ctx.scorer.mean_nll(table)
    generator = torch.get_rng_state()
    changed = [epoch.scoring(ctx).mean_nll(table) for epoch in training.run(table, ctx)]
    assert len(changed) == training.epochs
    assert same(weights(bundle.model), before)
    assert [name for name, _ in bundle.model.named_modules()] == modules
    assert {name: p.requires_grad for name, p in bundle.model.named_parameters()} == flags
    assert not bundle.model.training and not hasattr(bundle.model, "peft_config")
    assert all(p.grad is None for p in bundle.model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    np.testing.assert_array_equal(ctx.scorer.with_model(lambda: bundle).mean_nll(table), losses)


@pytest.mark.parametrize("training", [LORA, FULL])
def test_it_learns_more_every_epoch(training, ready):
    ctx, table = ready()
    start = ctx.scorer.mean_nll(table).mean()
    means = [start, *(epoch.scoring(ctx).mean_nll(table).mean() for epoch in training.run(table, ctx))]
    assert np.all(np.diff(means) < 0)


def test_it_is_put_back_when_the_caller_fails(ready, bundle):
    ctx, table = ready()
    before = weights(bundle.model)
    with pytest.raises(KeyError), FULL.trained(table, ctx):
        raise KeyError
    assert same(weights(bundle.model), before)
    with pytest.raises(ConfigError, match="nothing_there"):
        list(replace(LORA, lora={"target_modules": ["nothing_there"]}).run(table, ctx))
    assert same(weights(bundle.model), before) and not hasattr(bundle.model, "peft_config")


def test_a_checkpoint_names_weights_and_moments_as_the_model_does(ready):
    ctx, table = ready()
    rates, last = [], None
    for epoch in LORA.run(table, ctx):
        found = epoch.checkpoint()
        trained = {n: p for n, p in epoch.bundle.model.named_parameters() if p.requires_grad}
        assert trained.keys() == found.weights.keys() == found.exp_avg.keys() == found.exp_avg_sq.keys()
        assert all(torch.equal(p, found.weights[n]) for n, p in trained.items())
        assert all(found.exp_avg[n].shape == p.shape and (found.exp_avg_sq[n] >= 0).all() for n, p in trained.items())
        assert any(found.exp_avg[n].abs().sum() > 0 for n in trained)
        assert last is None or not same(last, found.weights)
        last = found.weights
        rates.append(found.learning_rate)
    # 24 rows in steps of 5: epochs end after steps 5, 10 and 15; a warm-up of one step, then a cosine over 14
    factors = [0.0, *((1 + math.cos(math.pi * step / 14)) / 2 for step in range(14))]
    assert rates == pytest.approx([1e-2 * np.mean(factors[5 * e : 5 * e + 5]) for e in range(3)])


def test_the_moments_are_adams(ready):
    """After one step from zero: m = 0.1 g and v = 0.001 g^2."""
    ctx, table = ready()
    for epoch in InnerTraining("full", batch_size=24, learning_rate=1e-3).run(table, ctx):
        found = epoch.checkpoint()
        for name, mean in found.exp_avg.items():
            torch.testing.assert_close((mean / 0.1) ** 2, found.exp_avg_sq[name] / 0.001, rtol=1e-4, atol=1e-12)


def test_the_order_of_the_rows_does_not_matter(ready):
    order = np.random.default_rng(0).permutation(24)
    results = []
    for rows in (None, order):
        ctx, table = ready(rows)
        ctx.scorer.shards = ctx.out / f"shards-{len(results)}"
        with LORA.trained(table, ctx) as epoch:
            results.append(epoch.checkpoint().weights)
    assert same(*results)


def test_by_content_is_an_order_of_the_texts(ready):
    order = np.random.default_rng(1).permutation(24)
    (_, plain), (_, mixed) = ready(), ready(order)
    first, second = plain.rows(by_content(plain)), mixed.rows(by_content(mixed))
    assert first.fingerprint() == second.fingerprint() != plain.fingerprint()


class Killed(BaseException):
    """Nothing catches it."""


def test_a_killed_training_goes_on(ready, monkeypatch):
    """Nothing that was finished is trained again, and the end is the same to the bit."""
    ctx, table = ready()
    ctx.scorer.shards = ctx.out / "whole"
    expected = [epoch.checkpoint() for epoch in LORA.run(table, ctx)]
    ctx.scorer.shards = ctx.out / "cut"
    step, steps = Trainer._step, []

    def counted(limit):
        def one(self, number):
            if len(steps) == limit:
                raise Killed
            steps.append(number)
            return step(self, number)

        monkeypatch.setattr(Trainer, "_step", one)

    counted(7)
    with pytest.raises(Killed):
        list(LORA.run(table, ctx))
    counted(1000)
    found = [epoch.checkpoint() for epoch in LORA.run(table, ctx)]
    assert steps == [0, 1, 2, 3, 4, 5, 6, *range(5, 15)]  # the epoch that was cut starts again
    for one, two in zip(expected, found, strict=True):
        assert same(one.weights, two.weights) and same(one.exp_avg, two.exp_avg)
        assert same(one.exp_avg_sq, two.exp_avg_sq) and one.learning_rate == two.learning_rate
    steps.clear()
    again = [epoch.checkpoint() for epoch in LORA.run(table, ctx)]
    assert not steps and same(again[-1].weights, expected[-1].weights)
    list(replace(LORA, learning_rate=1e-3).run(table, ctx))
    assert len(steps) == 15  # another training is not mistaken for it


def test_few_rows_still_make_epochs(ready):
    ctx, table = ready()
    steps = [epoch.trainer.progress.step for epoch in replace(LORA, batch_size=100).run(table.rows(np.arange(7)), ctx)]
    assert steps == [1, 2, 3]


def test_steps_can_be_limited(ready):
    ctx, table = ready()
    epochs = [epoch.trainer.progress.step for epoch in replace(LORA, max_steps=7).run(table, ctx)]
    assert epochs == [5, 7]


def test_full_training_of_a_quantised_model_is_refused(ready, bundle, monkeypatch):
    ctx, table = ready()
    monkeypatch.setattr(inner, "is_quantised", lambda model: True)
    with pytest.raises(ConfigError, match="quantised") as caught:
        list(replace(FULL, called="select.picker.").run(table, ctx))
    assert caught.value.where == "select.picker.trains=full" and "select.picker.trains=lora" in caught.value.todo


def test_knobs_that_train_nothing_are_refused():
    for knob in ("epochs", "learning_rate", "batch_size"):
        with pytest.raises(ConfigError, match=f"positive {knob}"):
            replace(LORA, **{knob: 0})


def test_rows_without_answers_are_refused(context, make_pool):
    with pytest.raises(DataError, match="trains on answers"):
        prepared_rows(make_pool([{"text": "one"}]), context())


@pytest.mark.slow
def test_two_processes_train_the_same(tiny_dir, rows_file, tmp_path):
    """Perplexities after training differ by rounding only."""
    import pyarrow.parquet as pq

    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = ["recipe=learning_percentage", f"model.path={tiny_dir}", f"data.path={rows_file}", "budget=6"]
        words += ["select.learning_rate=1e-2", f"launch.processes={processes}", "launch.threads=1", f"out={out}"]
        ftrun.run("select", overrides=words)
        found.append(pq.read_table(out / "selection/scores.parquet").to_pydict())
        assert json.loads((out / "summary.json").read_text())["status"] == "done"
    for name in ("ppl_0", "ppl_1", "ppl_3"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4)
    assert found[0]["ppl_0"] != found[0]["ppl_3"]
