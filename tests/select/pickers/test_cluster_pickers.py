"""Clustering, and the pickers that spread their choice over clusters."""

from __future__ import annotations

import numpy as np
import pytest

from ftrun.errors import ConfigError
from ftrun.select.base import Budget, Table
from ftrun.select.geometry import cluster as clustering
from ftrun.select.geometry.cluster import assign, cluster_rows, in_turns, places_within
from ftrun.select.pickers.cluster_share import ClusterShare
from ftrun.select.pickers.dac_iter import DacIter
from ftrun.select.pickers.deft_ucs import DeftUcs
from ftrun.select.pickers.first_chunk import FirstChunk
from ftrun.select.pickers.kmeans_random import KMeansRandom
from ftrun.select.pickers.kmq import Kmq
from ftrun.select.pickers.own import Own
from ftrun.select.row_numbers import row_numbers
from ftrun.select.scorers.code_ifd import CodeIfd

SIZES = [20, 12, 5, 3]


class Truth:
    cluster = np.repeat(range(4), SIZES)


class Hashes:
    """The part of a pool that gives rows their random numbers."""

    def __init__(self, hashes: np.ndarray):
        self.hashes = hashes

    def __len__(self) -> int:
        return len(self.hashes)


def table_of(vectors, scores=None, order=None) -> Table:
    """A table whose rows have contents 0, 1, 2 ..., shuffled by ``order``."""
    order = np.arange(len(vectors)) if order is None else order
    columns = {} if scores is None else {"score": np.asarray(scores, float)[order]}
    return Table(columns, np.ones(len(vectors), np.int64), Hashes(order.astype(np.uint64)), embeddings=vectors[order])


@pytest.fixture
def vectors() -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 0.01, (len(Truth.cluster), 6))
    return (np.eye(6)[Truth.cluster] + noise).astype(np.float32)


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(1).normal(0, 1, len(Truth.cluster))


def picks(picker, table, ctx, budget=None, column="score") -> np.ndarray:
    return picker.pick(table, np.arange(len(table)), column, budget or Budget(rows=len(table)), ctx)


def test_places_within_is_a_count_by_loop():
    cluster = np.random.default_rng(0).integers(3, 8, 60)
    turn, first = places_within(cluster)
    for position, number in enumerate(cluster):
        before = [other for other in range(position) if cluster[other] == number]
        assert turn[position] == len(before)
        assert first[position] == (before or [position])[0]


def test_a_row_joins_its_nearest_centre(monkeypatch):
    monkeypatch.setattr(clustering, "BLOCK", 7)
    random = np.random.default_rng(0)
    rows, centres = random.normal(size=(30, 4)).astype(np.float32), random.normal(size=(5, 4)).astype(np.float32)
    order = random.permutation(30)
    distance = ((rows[order][:, None] - centres) ** 2).sum(2)
    assert assign(rows, order, centres).tolist() == distance.argmin(1).tolist()


def test_centres_from_a_sample_cluster_all_rows(vectors, context, monkeypatch):
    monkeypatch.setattr(clustering, "FITTED_AT_LEAST", 0)
    monkeypatch.setattr(clustering, "FITTED_A_CENTRE", 6)
    rows = np.random.default_rng(0).permutation(len(Truth.cluster))
    found = cluster_rows(table_of(vectors), rows, 4, 50, 3, context())
    assert len(found.centres) == 4
    pairs = {(int(a), int(b)) for a, b in zip(found.label, Truth.cluster[rows], strict=True)}
    assert len(pairs) == 4  # one label a cluster, although only 24 rows shaped the centres


@pytest.mark.parametrize("picker", [KMeansRandom, Kmq, ClusterShare, FirstChunk, DacIter])
@pytest.mark.parametrize("knob", ["clusters", "iterations", "restarts"])
def test_no_clustering_is_refused_before_anything_is_scored(picker, knob):
    with pytest.raises(ConfigError, match=f"at least one {knob[:-1]}") as caught:
        picker(**{knob: 0})
    assert caught.value.where == f"select.picker.{knob}=0"


@pytest.mark.parametrize(("picker", "knob"), [(Kmq, "temperature"), (ClusterShare, "ratio")])
def test_knobs_of_a_draw_are_refused_before_anything_is_scored(picker, knob):
    with pytest.raises(ConfigError, match="above 0") as caught:
        picker(**{knob: 0})
    assert caught.value.where == f"select.picker.{knob}=0"


@pytest.mark.parametrize(
    "picker",
    [KMeansRandom(clusters=4), Kmq(clusters=4), ClusterShare(clusters=4), DeftUcs(clusters=4, base=0.3, alpha=0.5)],
    ids=lambda picker: picker.name,
)
def test_the_order_of_the_pool_does_not_matter(picker, vectors, scores, context):
    shuffled = np.random.default_rng(3).permutation(len(Truth.cluster))
    straight = picks(picker, table_of(vectors, scores), context(), Budget(rows=12))
    other = picks(picker, table_of(vectors, scores, shuffled), context(), Budget(rows=12))
    assert straight.tolist() == shuffled[other].tolist()
    assert straight.tolist() == picks(picker, table_of(vectors, scores), context(), Budget(rows=12)).tolist()


# ---- kmq ----


@pytest.mark.parametrize("picker", [Kmq, KMeansRandom])
@pytest.mark.parametrize(
    ("budget", "expected"), [(4, [1, 1, 1, 1]), (12, [3, 3, 3, 3]), (20, [6, 6, 5, 3]), (40, SIZES)]
)
def test_clusters_give_equal_shares_and_the_budget_is_met(picker, vectors, scores, context, budget, expected):
    chosen = picks(picker(clusters=4), table_of(vectors, scores), context(), Budget(rows=budget))
    assert len(set(chosen.tolist())) == budget
    assert np.bincount(Truth.cluster[chosen], minlength=4).tolist() == expected


def test_kmeans_random_draws_every_row_of_a_cluster_as_often(vectors, context):
    """Over many seeds; four standard deviations of a mean of draws."""
    table, draws, found = table_of(vectors), 400, np.zeros(len(vectors))
    for seed in range(draws):
        found[picks(KMeansRandom(clusters=4, restarts=1), table, context(seed=seed), Budget(rows=12))] += 1
    for number, size in enumerate(SIZES):
        share = 3 / size
        bound = 4 * np.sqrt(share * (1 - share) / draws)
        assert (np.abs(found[Truth.cluster == number] / draws - share) <= bound).all()


def test_kmq_draws_by_softmax_without_replacement(vectors, context):
    """Over many seeds the first row of a cluster is drawn as often as the softmax says, and the second likewise."""
    three, quality = vectors[37:], np.array([0.0, 1.0, -0.5])
    p = np.exp(quality) / np.exp(quality).sum()
    second = [sum(p[i] * p[j] / (1 - p[i]) for i in range(3) if i != j) for j in range(3)]
    draws = 4000
    found = np.zeros((2, 3))
    picker, table = Kmq(clusters=1), table_of(three, quality)
    for seed in range(draws):
        ctx = context(seed=seed)
        rows = np.arange(3)
        drawn = np.argsort(-picker._keys(table, rows, "score", ctx))
        found[0, drawn[0]] += 1
        found[1, drawn[1]] += 1
    np.testing.assert_allclose(found / draws, [p, second], atol=0.03)  # four standard deviations


def test_a_cold_kmq_takes_the_best_of_every_cluster(vectors, scores, context):
    chosen = picks(Kmq(clusters=4, temperature=1e-6), table_of(vectors, scores), context(), Budget(rows=8))
    best = [np.flatnonzero(Truth.cluster == c)[np.argsort(-scores[Truth.cluster == c])[:2]] for c in range(4)]
    assert set(chosen.tolist()) == set(np.concatenate(best).tolist())


# ---- the best share of every cluster ----


@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.4, 1.0])
def test_every_cluster_gives_the_floor_of_its_share(vectors, scores, context, ratio):
    chosen = picks(ClusterShare(clusters=4, ratio=ratio), table_of(vectors, scores), context())
    expected = []
    for number, size in enumerate(SIZES):
        members = np.flatnonzero(Truth.cluster == number)
        expected += members[np.argsort(-scores[members])][: int(round(ratio * size, 9))].tolist()
    assert sorted(chosen.tolist()) == sorted(expected)


def test_a_share_counts_the_rows_that_are_admitted(vectors, scores, context):
    admitted = np.flatnonzero(scores < 0.5)
    chosen = ClusterShare(clusters=4, ratio=0.5).pick(
        table_of(vectors, scores), admitted, "score", Budget(rows=99), context()
    )
    survivors = np.bincount(Truth.cluster[admitted], minlength=4)
    assert np.bincount(Truth.cluster[chosen], minlength=4).tolist() == (survivors // 2).tolist()
    assert set(chosen.tolist()) <= set(admitted.tolist())


def test_a_budget_cuts_the_clusters_in_proportion(vectors, scores, context):
    chosen = picks(ClusterShare(clusters=4, ratio=1.0), table_of(vectors, scores), context())
    for budget in range(1, 41):
        shares = np.bincount(Truth.cluster[chosen[:budget]], minlength=4)
        assert (np.abs(shares - budget * np.array(SIZES) / 40) <= 2).all()


def test_code_ifd_picks_by_share():
    assert isinstance(Own().stands_for(CodeIfd()), ClusterShare)


# ---- deft_ucs ----


def core_by_loop(rows, vectors, size, alpha):
    """The ``size`` rows of every true cluster, easy ones nearest to the mean of the cluster, hard ones farthest."""
    found = set()
    for number in range(4):
        members = np.array([row for row in rows if Truth.cluster[row] == number])
        centre = vectors[members].mean(0)
        distance = [
            1 - vectors[row] @ centre / np.linalg.norm(vectors[row]) / np.linalg.norm(centre) for row in members
        ]
        by_distance = members[np.argsort(distance)]
        easy = int(alpha * size)
        found |= set(by_distance[:easy].tolist()) | set(by_distance[len(by_distance) - (size - easy) :].tolist())
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_core_is_near_to_and_far_from_the_centroid(vectors, context, alpha):
    chosen = picks(DeftUcs(clusters=4, base=0, alpha=alpha), table_of(vectors), context(), Budget(rows=8))
    assert set(chosen.tolist()) == core_by_loop(range(40), vectors, 2, alpha)


def test_base_is_random_and_apart_from_the_core(vectors, context):
    table = table_of(vectors)
    chosen = picks(DeftUcs(clusters=4, base=0.5), table, context(), Budget(rows=16))
    assert len(set(chosen.tolist())) == 16
    base = np.argsort(row_numbers(table.pool, 0, "deft_ucs"), kind="stable")[:8]
    assert chosen[:8].tolist() == base.tolist()
    rest = sorted(set(range(40)) - set(base.tolist()))
    assert len(set(Truth.cluster[rest].tolist())) == 4
    taken = np.bincount(Truth.cluster[chosen[8:]], minlength=4)
    have = np.bincount(Truth.cluster[rest], minlength=4)
    assert (taken <= have).all() and (taken[have > 2] >= 2).all()


def test_a_cluster_smaller_than_its_share_is_taken_whole(vectors, context):
    chosen = picks(DeftUcs(clusters=4, base=0, alpha=0.5), table_of(vectors), context(), Budget(rows=20))
    assert np.bincount(Truth.cluster[chosen]).tolist() == [6, 6, 5, 3]
    assert len(set(chosen.tolist())) == 20  # easy and hard rows are never the same


def test_deft_ucs_by_tokens_and_its_bounds(vectors, context):
    table = table_of(vectors)
    table.lengths = np.arange(1, 41)
    chosen = picks(DeftUcs(clusters=4, base=0.5), table, context(), Budget(tokens=200))
    assert 200 - 40 < table.lengths[chosen].sum() <= 200
    assert len(picks(DeftUcs(base=1), table, context(), Budget(rows=40))) == 40
    with pytest.raises(ConfigError, match="shares"):
        picks(DeftUcs(alpha=1.5), table, context())


def test_in_turns_by_loop():
    cluster = np.random.default_rng(2).integers(0, 5, 40)
    queues: dict[int, list[int]] = {}
    for position, number in enumerate(cluster.tolist()):
        queues.setdefault(number, []).append(position)
    expected = []
    while any(queues.values()):
        expected += [queue.pop(0) for queue in queues.values() if queue]
    assert in_turns(cluster).tolist() == expected
