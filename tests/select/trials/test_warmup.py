"""Scores by a model that was first trained on a few rows of every cluster."""

from __future__ import annotations

import numpy as np
import pytest

from ftrun.config.settings import SelectConfig
from ftrun.errors import ConfigError
from ftrun.models.fast import speed_up
from ftrun.select.scorers.ifd import Ifd
from ftrun.select.scoring.texts import read_turns
from ftrun.select.trials import warmup
from ftrun.select.trials.inner import InnerTraining
from ftrun.select.trials.warmup import strided, warmup_rows

WARM = {"warmup": 8, "warmup_clusters": 4, "warmup_learning_rate": 1e-2, "warmup_epochs": 2}


@pytest.mark.parametrize("count", [1, 3, 10, 80])
def test_an_even_stride_between_the_percentiles(count):
    loss = np.random.default_rng(0).normal(size=101)
    found = strided(loss, count, [25, 75])
    ranked = np.argsort(np.argsort(loss))
    within = [place for place in range(101) if 25 <= ranked[place] <= 75]
    assert len(found) == min(count, 51) and set(found.tolist()) <= set(within)
    gaps = np.diff([within.index(place) for place in found.tolist()])
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_a_cluster_with_too_few_rows_gives_them_all():
    assert strided(np.array([3.0, 1.0, 2.0]), 4, [25, 75]).tolist() == [0, 1, 2]
    assert strided(np.array([3.0, 1.0, 2.0]), 3, [25, 75]).tolist() == [2]


def test_every_cluster_gives_the_same_number(rows, make_pool, context, monkeypatch):
    pool, ctx = make_pool(rows), context()
    vectors = np.eye(4, dtype=np.float32)[np.arange(24) % 4]
    monkeypatch.setattr(warmup, "embed_rows", lambda *_: vectors)
    turns = read_turns(pool, ctx, "alpaca")
    found = warmup_rows(turns, pool, np.arange(24), 8, 4, [0, 100], ctx)
    assert np.bincount(found % 4).tolist() == [2, 2, 2, 2]
    few = warmup_rows(turns, pool, np.arange(0, 24, 2), 8, 2, [25, 75], ctx)
    assert set(few.tolist()) <= set(range(0, 24, 2)) and 0 < len(few) <= 8


def test_the_trained_model_scores(rows, make_pool, context, bundle, monkeypatch):
    speed_up(bundle.model)
    pool, trained = make_pool(rows), []
    run = InnerTraining.run

    def watched(self, table, ctx, title=""):
        trained.append(sorted(set(table.record.tolist())))
        return run(self, table, ctx, title)

    monkeypatch.setattr(InnerTraining, "run", watched)
    plain = Ifd().score(pool, context())
    warm = Ifd(**WARM).score(pool, context(shared=SelectConfig(batch_tokens=64)))
    again = Ifd(**WARM).score(pool, context(shared=SelectConfig(batch_tokens=4096)))
    assert len(trained) == 2 and 0 < len(trained[0]) <= 8
    assert (warm["conditional"] < plain["conditional"]).all()
    np.testing.assert_allclose(warm["ifd"], again["ifd"], atol=1e-6)
    np.testing.assert_array_equal(Ifd().score(pool, context())["ifd"], plain["ifd"])  # the model is its old self


def test_the_order_of_the_rows_does_not_matter(rows, make_pool, context, bundle):
    speed_up(bundle.model)
    order = np.random.default_rng(3).permutation(24)
    plain = Ifd(**WARM).score(make_pool(rows), context())
    ctx = context()
    ctx.scorer.shards = ctx.out / "elsewhere"
    mixed = Ifd(**WARM).score(make_pool([rows[place] for place in order]), ctx)
    np.testing.assert_array_equal(plain["ifd"][order], mixed["ifd"])


def test_a_prompt_that_the_model_cannot_read_is_no_candidate(rows, make_pool, context, bundle):
    """It has no score, and the others have theirs."""
    speed_up(bundle.model)
    ctx = context()
    long = {"instruction": "word " * 2 * bundle.context_length, "output": "yes no"}
    found = Ifd(**WARM).score(make_pool([*rows, long]), ctx)["ifd"]
    assert np.isnan(found).tolist() == [False] * 24 + [True]
    assert ctx.scorer.reasons == {24: "the prompt fills max_length=512"}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"warmup": 50}, "less than one for each"),
        ({"warmup": -1}, "warmup must be above 0"),
        ({"warmup_clusters": 0}, "warmup_clusters must be above 0"),
        ({"warmup_learning_rate": 0.0}, "warmup_learning_rate must be above 0"),
        ({"warmup_percentiles": [75, 25]}, "percentiles"),
        ({"max_length": 0}, "max_length must be above 0"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        Ifd(**{"warmup": 200, **knobs})
