"""Facility location and k-center against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from ftrun.errors import ConfigError
from ftrun.select.base import Budget, Table
from ftrun.select.geometry.greedy import Goal, block_by_block, spoken
from ftrun.select.pickers import facility_location, k_center
from ftrun.select.pickers.facility_location import FacilityLocation, Near, lazy_greedy, stochastic_greedy
from ftrun.select.pickers.k_center import KCenter, farthest_first


class Hashes:
    """The part of a pool that gives rows their random numbers."""

    def __init__(self, hashes: np.ndarray):
        self.hashes = hashes

    def __len__(self) -> int:
        return len(self.hashes)


def table_of(vectors, order=None, **columns) -> Table:
    order = np.arange(len(vectors)) if order is None else order
    shuffled = {name: np.asarray(values, float)[order] for name, values in columns.items()}
    return Table(shuffled, np.ones(len(vectors), np.int64), Hashes(order.astype(np.uint64)), embeddings=vectors[order])


@pytest.fixture
def vectors() -> np.ndarray:
    made = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def similarity(vectors) -> np.ndarray:
    apart = np.sqrt(((vectors[:, None].astype(float) - vectors) ** 2).sum(2))
    return np.exp(-apart / vectors.shape[1])


def covered(vectors, chosen) -> float:
    return float(similarity(vectors)[:, chosen].max(1).sum())


def greedy_by_loop(vectors, picks) -> list[int]:
    chosen: list[int] = []
    for _ in range(picks):
        values = [-1.0 if j in chosen else covered(vectors, [*chosen, j]) for j in range(len(vectors))]
        chosen.append(int(np.argmax(values)))
    return chosen


def rows_goal(count, rows) -> Goal:
    return Goal(np.ones(rows), count)


def run(picker, table, ctx, budget, column="") -> np.ndarray:
    return picker.pick(table, np.arange(len(table)), column, budget, ctx)


@pytest.mark.parametrize("keep", [True, False])
def test_lazy_greedy_is_greedy(vectors, keep):
    found = lazy_greedy(Near(vectors, keep), rows_goal(12, 60))
    assert found.tolist() == greedy_by_loop(vectors, 12)


def test_similarity_is_exp_of_minus_distance_over_width(vectors):
    for keep in (True, False):
        np.testing.assert_allclose(Near(vectors, keep).to_all(np.arange(60)) + 1, similarity(vectors), atol=1e-6)


def test_picking_everything_ends(vectors):
    copies = np.concatenate([vectors[:5], vectors[:5]])
    assert sorted(lazy_greedy(Near(copies, True), rows_goal(99, 10)).tolist()) == list(range(10))
    random = np.random.default_rng(0)
    assert sorted(stochastic_greedy(Near(copies, True), rows_goal(99, 10), 0.1, random).tolist()) == list(range(10))
    assert sorted(farthest_first(copies, rows_goal(99, 10)).tolist()) == list(range(10))


def test_stochastic_greedy_comes_close(vectors):
    exact = covered(vectors, greedy_by_loop(vectors, 10))
    start = covered(vectors, [0]) - 1
    for seed in range(5):
        near = Near(vectors, True)
        found = stochastic_greedy(near, rows_goal(10, 60), 0.1, np.random.default_rng(seed)).tolist()
        assert len(set(found)) == 10
        assert covered(vectors, found) - start >= 0.9 * (exact - start)


def test_looking_at_every_row_is_greedy(vectors):
    found = stochastic_greedy(Near(vectors, True), rows_goal(8, 60), 1e-30, np.random.default_rng(0))
    assert found.tolist() == greedy_by_loop(vectors, 8)


def test_blocks_give_their_shares_in_turn(context):
    goal = rows_goal(12, 60)
    found = block_by_block(60, 20, goal, lambda part, number, share: np.arange(int(share.amount)), context())
    assert found.tolist() == [0, 20, 40, 1, 21, 41, 2, 22, 42, 3, 23, 43]


@pytest.mark.parametrize(
    "picker",
    [
        FacilityLocation(),
        FacilityLocation(method="stochastic", block=16),
        KCenter(),
        KCenter(method="blocks", block=16),
    ],
    ids=["facility", "stochastic", "center", "blocks"],
)
def test_budget_order_and_seed(picker, vectors, context):
    shuffled = np.random.default_rng(3).permutation(60)
    straight = run(picker, table_of(vectors), context(), Budget(rows=15))
    assert len(set(straight.tolist())) == 15
    other = run(picker, table_of(vectors, shuffled), context(), Budget(rows=15))
    assert straight.tolist() == shuffled[other].tolist()
    table = table_of(vectors)
    table.lengths = np.random.default_rng(0).integers(1, 20, 60)
    chosen = run(picker, table, context(), Budget(tokens=150))
    assert 130 < table.lengths[chosen].sum() <= 150


def test_the_best_share_enters(vectors, context):
    score = np.random.default_rng(1).normal(size=60)
    score[7] = np.nan
    table, ctx = table_of(vectors, score=score), context()
    best = np.argsort(-np.nan_to_num(score, nan=-9))[:12]
    candidates = np.flatnonzero(~np.isnan(score))
    chosen = FacilityLocation(top_share=0.2).pick(table, candidates, "score", Budget(rows=4), ctx)
    expected = best[greedy_by_loop(vectors[best], 4)]
    entered = {row: place for place, row in enumerate(best.tolist())}
    # two rows that cover only each other are worth the same: which of them is picked is a matter of rounding
    worth = [covered(vectors[best], [entered[row] for row in rows.tolist()]) for rows in (chosen, expected)]
    assert worth[0] == pytest.approx(worth[1], abs=1e-6)
    everything = FacilityLocation(top_share=0.2).pick(table, candidates, "score", Budget(rows=30), ctx)
    assert set(everything.tolist()) == set(best.tolist())
    assert "more than the 12" in ctx.report.console.file.getvalue()
    with pytest.raises(ConfigError, match="needs a score"):
        run(FacilityLocation(top_share=0.2), table, ctx, Budget(rows=4))


@pytest.mark.parametrize("knobs", [{"top_share": 0}, {"epsilon": 0}, {"epsilon": 1}, {"block": 1}])
def test_knobs_out_of_bounds(vectors, context, knobs):
    with pytest.raises(ConfigError):
        run(FacilityLocation(**knobs), table_of(vectors), context(), Budget(rows=4), "score")


@pytest.mark.parametrize(("module", "picker"), [(facility_location, FacilityLocation), (k_center, KCenter)])
def test_quadratic_work_is_announced(module, picker, vectors, context, monkeypatch):
    monkeypatch.setattr(module, "EXACT_ROWS", 20)
    ctx = context()
    run(picker(block=16), table_of(vectors), ctx, Budget(rows=4))
    said = ctx.report.console.file.getvalue()
    assert "blocks of 16" in said and "method=exact" in " ".join(said.split())
    ctx = context()
    exact = run(picker(method="exact"), table_of(vectors), ctx, Budget(rows=4))
    assert "linear in the rows" in " ".join(ctx.report.console.file.getvalue().split())
    monkeypatch.setattr(module, "EXACT_ROWS", 12_000)
    assert exact.tolist() == run(picker(), table_of(vectors), context(), Budget(rows=4)).tolist()


def test_farthest_first_is_the_plain_loop(vectors):
    apart = np.sqrt(((vectors[:, None].astype(float) - vectors) ** 2).sum(2))
    expected = [int(((vectors - vectors.mean(0)) ** 2).sum(1).argmin())]
    while len(expected) < 12:
        expected.append(int(apart[:, expected].min(1).argmax()))
    assert farthest_first(vectors, rows_goal(12, 60)).tolist() == expected


def test_k_center_is_within_twice_the_best_radius():
    from itertools import combinations

    points = np.random.default_rng(4).normal(size=(12, 2)).astype(np.float32)
    apart = np.sqrt(((points[:, None] - points) ** 2).sum(2))
    best = min(apart[:, list(some)].min(1).max() for some in combinations(range(12), 3))
    assert apart[:, farthest_first(points, rows_goal(3, 12))].min(1).max() <= 2 * best + 1e-6


def test_copies_are_picked_last():
    points = np.concatenate([np.zeros((5, 2)), np.eye(2)]).astype(np.float32)
    assert set(farthest_first(points, rows_goal(3, 7)).tolist()) >= {5, 6}


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (90, "90 s"), (600, "10 minutes"), (9000, "2 hours")])
def test_durations(seconds, words):
    assert spoken(seconds) == words
