"""GOT-D: the sign, the calibration and the potentials."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ftrun.config.settings import SelectConfig
from ftrun.errors import ConfigError
from ftrun.select.geometry.embed import embed_pieces
from ftrun.select.scorers.got_d import GotD, calibrated, row_means


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def plain_potentials(target: np.ndarray, candidates: np.ndarray, epsilon: float, rounds: int = 3000) -> np.ndarray:
    """Alternating the two optimality conditions, one potential at a time."""
    cost = np.array([[((t - c) ** 2).sum() for c in candidates.astype(float)] for t in target.astype(float)])
    f, g = np.zeros(len(target)), np.zeros(len(candidates))
    for _ in range(rounds):
        for i in range(len(f)):
            f[i] = -epsilon * np.log(sum(np.exp((g[j] - cost[i, j]) / epsilon) / len(g) for j in range(len(g))))
        for j in range(len(g)):
            g[j] = -epsilon * np.log(sum(np.exp((f[i] - cost[i, j]) / epsilon) / len(f) for i in range(len(f))))
    return g


def test_potentials_against_a_plain_loop(context):
    rng = np.random.default_rng(0)
    target, candidates = unit(rng.normal(size=(4, 3))), unit(rng.normal(size=(7, 3)))
    found = GotD(threshold=1e-9).potentials(target, candidates, context())
    expected = plain_potentials(target, candidates, 0.1, rounds=200)
    assert np.allclose(found - found.mean(), expected - expected.mean(), atol=1e-5)


def test_the_sign_on_a_toy_pair(context):
    """A candidate on the target has the smaller gradient: mass there lowers the distance."""
    target = unit(np.array([[1.0, 0.0]]))
    near, far = [1.0, 0.05], [-1.0, 0.1]
    g = calibrated(GotD(threshold=1e-9).potentials(target, unit(np.array([near, far])), context()))
    assert g[0] < 0 < g[1]


def test_the_gradient_is_that_of_the_distance(context):
    """Moving a little mass from one candidate to another changes the smoothed distance by the potentials' difference."""
    rng = np.random.default_rng(1)
    target, candidates = unit(rng.normal(size=(5, 3))), unit(rng.normal(size=(6, 3)))
    epsilon, step = 0.3, 1e-4
    g = GotD(threshold=1e-12, epsilon=epsilon, iterations=5000).potentials(target, candidates, context())
    cost = 2 - 2 * target.astype(float) @ candidates.T.astype(float)

    def distance(b: np.ndarray) -> float:
        """min <P, cost> + epsilon KL(P | a b), by its dual."""
        a, f, h = np.full(5, 1 / 5), np.zeros(5), np.zeros(6)
        for _ in range(4000):
            f = -epsilon * np.log(np.exp((h - cost) / epsilon) @ b)
            h = -epsilon * np.log(a @ np.exp((f[:, None] - cost) / epsilon))
        return float(a @ f + b @ h)

    base = np.full(6, 1 / 6)
    moved = base.copy()
    moved[2], moved[4] = base[2] + step, base[4] - step
    back = base.copy()
    back[2], back[4] = base[2] - step, base[4] + step
    assert (distance(moved) - distance(back)) / (2 * step) == pytest.approx(g[2] - g[4], abs=1e-4)


def test_a_copy_of_a_target_ranks_above_a_far_point(context):
    rng = np.random.default_rng(2)
    target = unit(rng.normal(size=(6, 4)) + np.array([3.0, 0, 0, 0]))
    candidates = np.concatenate([target[2:3], unit(rng.normal(size=(8, 4)) - np.array([3.0, 0, 0, 0]))])
    g = GotD().potentials(target, candidates, context())
    assert (g[0] < g[1:]).all()


def test_permuted_candidates_permute_the_gradients(context):
    rng = np.random.default_rng(3)
    target, candidates = unit(rng.normal(size=(5, 4))), unit(rng.normal(size=(30, 4)))
    order = rng.permutation(30)
    one, other = (GotD().potentials(target, c, context()) for c in (candidates, candidates[order]))
    assert np.allclose(one[order], other, atol=1e-6)


def test_calibration_keeps_the_ranking_and_drops_the_constant():
    g = np.random.default_rng(0).normal(size=20)
    expected = [g[z] - np.mean([g[other] for other in range(20) if other != z]) for z in range(20)]
    assert np.allclose(calibrated(g), expected)
    assert np.allclose(calibrated(g + 7), calibrated(g))
    assert np.argsort(calibrated(g)).tolist() == np.argsort(g).tolist()
    assert calibrated(g).sum() == pytest.approx(0, abs=1e-9)


def test_long_rows_score_the_mean_of_their_pieces(rows, make_pool, context, tmp_path):
    file = tmp_path / "queries.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[20:]))
    ctx = context(select="got_d", shared=SelectConfig(queries=[str(file)]))
    pool = make_pool(rows[:10])
    scorer = GotD(embedding="model", piece=20)
    columns = scorer.score(pool, ctx)
    pieces, owner = embed_pieces(pool, ctx, "model", 20)
    target, _ = embed_pieces(make_pool(rows[20:]), ctx, "model", 20)
    assert len(pieces) > 10 and set(owner.tolist()) == set(range(10))
    g = calibrated(scorer.potentials(target, pieces, ctx))
    expected = [-np.mean([g[p] for p in range(len(g)) if owner[p] == row]) for row in range(10)]
    assert np.allclose(columns["got_d"], expected, atol=1e-5)
    assert ctx.scorer.similarity.matrix.shape == (4, 10)
    assert np.allclose(columns["similarity"], ctx.scorer.similarity.matrix.max(0))


def test_row_means_have_unit_length():
    pieces = unit(np.random.default_rng(0).normal(size=(4, 3)))
    means = row_means(pieces, np.array([0, 0, 2, 2]), 3)
    assert np.allclose(np.linalg.norm(means, axis=1), [1, 0, 1])
    assert np.allclose(means[0], (pieces[0] + pieces[1]) / np.linalg.norm(pieces[0] + pieces[1]))


@pytest.mark.parametrize("knobs", [{"epsilon": 0.0}, {"momentum": 2.0}, {"piece": 0}, {"iterations": 0}], ids=repr)
def test_knobs_out_of_range(knobs, rows, make_pool, context):
    with pytest.raises(ConfigError, match="above 0"):
        GotD(**knobs).score(make_pool(rows), context(select="got_d"))
