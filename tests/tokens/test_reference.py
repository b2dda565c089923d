"""A reference that is made on the way: what it learns, what it leaves untouched, and that it is made once."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ftrun.errors import ConfigError
from ftrun.select.trials.inner import InnerTraining, by_content
from ftrun.tokens.policies.token_cleaning import TokenCleaning
from ftrun.tokens.reference import drawn_rows, losses_after, own_scoring, short_training
from ftrun.training.loop import Trainer

QUICK = {"reference": "auto", "reference_rows": 0.5, "reference_epochs": 3, "reference_learning_rate": 1e-2}


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture
def steps(monkeypatch):
    """Numbers of the steps trained; ``steps.limit`` of them, then the process dies."""

    class Steps(list):
        limit = 1000

    taken, step = Steps(), Trainer._step

    def one(self, number):
        if len(taken) == taken.limit:
            raise Killed
        taken.append(number)
        return step(self, number)

    monkeypatch.setattr(Trainer, "_step", one)
    return taken


def test_the_model_is_as_before_and_the_scores_say_what_was_learned(bundle, table, context):
    before = {name: p.detach().clone() for name, p in bundle.model.named_parameters()}
    ctx = context("token_cleaning")
    scores, _ = TokenCleaning(**QUICK).precompute(table, ctx)
    after = dict(bundle.model.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    learned = drawn_rows(table, 0.5, ctx.seed)
    assert len(learned) == 6
    mine = np.isin(np.repeat(table.record, table.lengths), learned.record) & ~np.isnan(scores)
    assert scores[mine].mean() > 0.01
    assert "drawn at random" in ctx.report.warnings[0]
    assert not (ctx.out / "selection" / "token_shards").exists()


def test_the_losses_are_those_of_the_trained_model(bundle, table, context, plain_losses):
    """Against a pass over single rows while the trained model is in place."""
    from dataclasses import replace

    ctx = context("token_cleaning")
    base, rows = own_scoring(ctx), drawn_rows(table, 0.5, 0)
    training = InnerTraining(epochs=2, learning_rate=1e-2, batch_size=4)
    found = losses_after(training, rows, table, base, ctx, "train")
    with training.trained(rows, replace(ctx, scoring=base)) as epoch:
        expected = plain_losses(table, epoch.bundle.model)
    np.testing.assert_allclose(found[~np.isnan(found)], np.concatenate(list(expected.values())), atol=1e-5)


def test_it_is_made_once(table, context, steps):
    first = TokenCleaning(**QUICK).precompute(table, context("token_cleaning"))
    assert len(steps) == 3
    ctx = context("token_cleaning")
    again = TokenCleaning(**QUICK).precompute(table, ctx)
    assert len(steps) == 3
    np.testing.assert_array_equal(first[0], again[0])
    TokenCleaning(**QUICK | {"reference_learning_rate": 2e-2}).precompute(table, ctx)
    assert len(steps) == 6  # another training is another reference


def test_a_killed_one_goes_on(table, context, steps):
    expected, _ = TokenCleaning(**QUICK).precompute(table, context("token_cleaning"))
    del steps[:]
    slow = QUICK | {"reference_learning_rate": 1.1e-2}
    steps.limit = 2
    with pytest.raises(Killed):
        TokenCleaning(**slow).precompute(table, context("token_cleaning"))
    steps.limit = 1000
    found, _ = TokenCleaning(**slow).precompute(table, context("token_cleaning"))
    assert steps == [0, 1, 2]  # one an epoch: what was finished is not trained again
    assert not np.array_equal(found, expected, equal_nan=True)


def test_good_rows_come_from_a_file(bundle, table, context, rows, tmp_path, steps):
    file = tmp_path / "good.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:7]))
    ctx = context("token_cleaning")
    TokenCleaning(**QUICK, reference_path=str(file)).precompute(table, ctx)
    assert not ctx.report.warnings and steps == [0, 1, 2]


@pytest.mark.parametrize(
    ("rows", "batch_size", "warmup"),
    [(1, 8, 0), (100, 8, 0), (200, 10, 0), (959, 47, 0), (960, 48, 0), (10_000, 48, 0.03)],
)
def test_few_rows_are_learned_in_smaller_steps(rows, batch_size, warmup):
    """A first step of rate 0 would be wasted where there are few."""
    training = short_training(rows, 1, 1e-4, 48, {})
    assert (training.batch_size, training.warmup) == (batch_size, warmup)


def test_rows_are_drawn_by_content(table):
    drawn = drawn_rows(table, 0.25, 3)
    turned = drawn_rows(table.rows(np.arange(len(table))[::-1]), 0.25, 3)
    assert drawn.fingerprint() == turned.fingerprint() and len(drawn) == 3
    assert drawn_rows(table, 0.25, 4).fingerprint() != drawn.fingerprint()
    assert len(by_content(drawn_rows(table, 1.0, 0))) == len(table)


@pytest.mark.parametrize(("knob", "value"), [("reference_rows", 0.0), ("reference_rows", 1.5), ("reference_epochs", 0)])
def test_wrong_knobs_are_refused(knob, value):
    with pytest.raises(ConfigError, match=knob):
        TokenCleaning(**{knob: value})
