"""Pickers turn scores and a budget into rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftrun.errors import ConfigError
from ftrun.select.base import Budget, Table
from ftrun.select.geometry.cluster import in_turns
from ftrun.select.pickers.kmeans_random import KMeansRandom
from ftrun.select.pickers.own import Own
from ftrun.select.pickers.threshold import Threshold
from ftrun.select.pickers.top_k import TopK
from ftrun.select.scorers.ifd import Ifd


@pytest.fixture
def table() -> Table:
    return Table({"score": np.array([0.2, 0.9, 0.9, np.nan, 0.5, 0.1])}, lengths=np.array([10, 20, 30, 40, 50, 60]))


def pick(picker, table, ctx, budget, candidates=(0, 1, 2, 4, 5)) -> list[int]:
    return picker.pick(table, np.array(candidates), "score", budget, ctx).tolist()


def test_top_k_takes_the_highest_ties_by_place(table, context):
    assert pick(TopK(), table, context(), Budget(rows=3)) == [1, 2, 4]
    assert pick(TopK(), table, context(), Budget(rows=3), candidates=(5, 4, 2, 0)) == [2, 4, 0]
    assert pick(TopK(), table, context(), Budget(rows=99)) == [1, 2, 4, 0, 5]


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5, np.nan]), min_size=1, max_size=30), st.data())
def test_top_k_is_the_beginning_of_the_whole_order(scores, data):
    """It orders only what can be chosen; many ties, and rows without a score at the end."""
    table = Table({"score": np.array(scores)}, lengths=np.ones(len(scores), np.int64))
    candidates = data.draw(st.permutations(range(len(scores))))
    ordered = sorted(
        range(len(scores)), key=lambda place: (np.isnan(scores[place]), -np.nan_to_num(scores[place]), place)
    )
    for rows in range(len(scores) + 2):
        assert pick(TopK(), table, None, Budget(rows=rows), candidates) == ordered[:rows]


def test_top_k_by_tokens_stays_within_them(table, context):
    assert pick(TopK(), table, context(), Budget(tokens=99)) == [1, 2]
    assert pick(TopK(), table, context(), Budget(tokens=100)) == [1, 2, 4]


def test_threshold_bounds_both_sides(table, context):
    everything = Budget(rows=6)
    assert pick(Threshold(minimum=0.5), table, context(), everything) == [1, 2, 4]
    assert pick(Threshold(maximum=0.5), table, context(), everything) == [4, 0, 5]
    assert pick(Threshold(minimum=0.2, maximum=0.5), table, context(), everything) == [4, 0]
    assert pick(Threshold(minimum=0.2), table, context(), Budget(rows=1)) == [1]


def test_threshold_needs_a_bound(table, context):
    with pytest.raises(ConfigError, match="no bound"):
        pick(Threshold(), table, context(), Budget(rows=1))


def test_own_is_the_scorers_picker(table, context):
    assert isinstance(Own().stands_for(Ifd()), TopK)
    assert pick(Own(), table, context(select="ifd"), Budget(rows=3)) == [1, 2, 4]


def test_every_prefix_holds_equal_shares():
    cluster = np.random.default_rng(0).integers(0, 7, 100)
    sizes = np.bincount(cluster)
    order = in_turns(cluster)
    assert sorted(order.tolist()) == list(range(100))
    for budget in range(1, 101):
        taken = np.bincount(cluster[order[:budget]], minlength=7)
        short = taken < taken.max() - 1
        assert (taken[short] == sizes[short]).all()  # only a cluster with nothing left gives less


@pytest.fixture
def clustered(rows, make_pool) -> Table:
    """Three far-apart clusters of 12, 8 and 4 rows."""
    cluster = np.repeat([0, 1, 2], [12, 8, 4])
    noise = np.random.default_rng(0).normal(0, 0.01, (24, 3))
    return Table({}, np.ones(24, np.int64), make_pool(rows), embeddings=np.eye(3)[cluster] + noise)


@pytest.mark.parametrize(("budget", "expected"), [(3, [1, 1, 1]), (9, [3, 3, 3]), (18, [7, 7, 4]), (24, [12, 8, 4])])
def test_kmeans_random_meets_the_budget_evenly(clustered, context, budget, expected):
    picked = pick(KMeansRandom(clusters=3), clustered, context(), Budget(rows=budget), candidates=range(24))
    assert len(set(picked)) == budget
    assert np.bincount(np.repeat([0, 1, 2], [12, 8, 4])[picked], minlength=3).tolist() == expected


def test_kmeans_random_spreads_the_remainder(clustered, context):
    picked = pick(KMeansRandom(clusters=3), clustered, context(), Budget(rows=8), candidates=range(24))
    assert sorted(np.bincount(np.repeat([0, 1, 2], [12, 8, 4])[picked])) == [2, 3, 3]


def test_kmeans_random_is_random_by_seed_and_not_by_order(rows, make_pool, context):
    order = np.random.default_rng(5).permutation(24)

    def picks(permuted, seed: int) -> set[str]:
        pool = make_pool(permuted)
        table = Table({}, np.ones(24, np.int64), pool)
        picker = KMeansRandom(clusters=4, embedding="model", of="row")
        return {
            pool.fields(place)["output"] + pool.fields(place)["instruction"]
            for place in pick(picker, table, context(seed=seed), Budget(rows=8), candidates=range(24))
        }

    assert picks(rows, 0) == picks([rows[i] for i in order], 0)
    assert picks(rows, 0) != picks(rows, 1)


def test_kmeans_random_with_more_clusters_than_texts(make_pool, context):
    rows = [{"prompt": f"question {i % 3}", "completion": f"answer {i}"} for i in range(9)]
    table, ctx = Table({}, np.ones(9, np.int64), make_pool(rows)), context()
    picked = pick(KMeansRandom(clusters=512, embedding="model"), table, ctx, Budget(rows=6), candidates=range(9))
    assert np.bincount([place % 3 for place in picked]).tolist() == [2, 2, 2]
    assert "3 clusters instead of 512" in ctx.report.console.file.getvalue()
