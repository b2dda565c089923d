"""LESS: row gradients, their projection, and the influence they make."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from ftrun.errors import ConfigError, DataError, ResourceError
from ftrun.select.base import Budget, Table
from ftrun.select.geometry import gradients
from ftrun.select.geometry.gradients import GradientFeatures, Projection
from ftrun.select.pickers.round_robin import RoundRobin
from ftrun.select.pickers.top_k import TopK
from ftrun.select.scorers import less
from ftrun.select.scorers.less import Less, task_influence
from ftrun.select.trials.inner import InnerTraining, prepared_rows
from ftrun.training.scoring import Similarity

SMALL = {"warmup_rows": 0.5, "epochs": 2, "batch_size": 4, "r": 4, "dimension": 256, "learning_rate": 1e-2}


@pytest.fixture
def warm(rows, make_pool, context):
    """The last epoch of a short warm-up, with the rows that it saw."""
    ctx = context(select="less")
    table = prepared_rows(make_pool(rows), ctx).table
    training = InnerTraining(
        epochs=1, learning_rate=1e-2, batch_size=4, lora={"r": 4, "lora_alpha": 16.0, "target_modules": "attention"}
    )
    with closing(training.run(table, ctx)) as epochs:
        yield next(iter(epochs)), table


def plain_gradient(epoch, table, index: int) -> dict[str, np.ndarray]:
    """Of the mean loss over the response, by the model's own logits, every parameter by itself."""
    model = epoch.bundle.model.eval()
    item = table.sequence(index)
    ids, asked = torch.tensor(np.array(item.input_ids)).long(), torch.tensor(np.array(item.loss_weight[1:]) > 0)
    logits = model(ids[None]).logits[0, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits[asked], ids[1:][asked])
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()))
    return {name: gradient.numpy().astype(np.float64) for name, gradient in zip(named, found, strict=True)}


# ---- projection ----


def test_projection_is_the_product_with_its_signs(monkeypatch):
    monkeypatch.setattr(gradients, "SIGNS_AT_ONCE", 64 * 10)  # blocks of 10 parameters, the last of 3
    projection = Projection(64, seed=3)
    signs = np.concatenate([projection.signs(block, height).numpy() for block, height in enumerate([10, 10, 3])])
    assert set(np.unique(signs)) == {-1.0, 1.0} and abs(signs.mean()) < 0.1
    rows = np.random.default_rng(0).normal(size=(19, 23)).astype(np.float32)
    expected = [[sum(row[p] * signs[p, k] for p in range(23)) / 8 for k in range(64)] for row in rows]
    assert np.allclose(projection.project(torch.from_numpy(rows)).numpy(), expected, atol=1e-5)


def test_projection_keeps_inner_products_in_expectation():
    rng = np.random.default_rng(1)
    a, b = (torch.from_numpy(rng.normal(size=(1, 40)).astype(np.float32)) for _ in range(2))
    exact = float(a @ b.T)
    products = [float(p.project(a) @ p.project(b).T) for p in (Projection(32, seed) for seed in range(400))]
    spread = np.std(products) / np.sqrt(len(products))
    assert abs(np.mean(products) - exact) < 4 * spread


def test_signs_are_scrambled_numbers():
    """splitmix64 in whole numbers without bounds, cut to 64 bits."""
    whole = 2**64

    def plain(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % whole
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % whole
        return z ^ (z >> 31)

    numbers = [0, 1, 5, -3, 2**62 + 12345, -(2**63)]
    assert [z % whole for z in gradients.scrambled(torch.tensor(numbers)).tolist()] == [
        plain(z % whole) for z in numbers
    ]
    signs = Projection(128, seed=7).signs(3, 2).flatten()
    for word in range(4):
        scrambled = plain(((3 << 32) + word + 1) * 0x9E3779B97F4A7C15 + plain(7) & (whole - 1))
        bits = [byte >> place & 1 for byte in scrambled.to_bytes(8, "little") for place in range(7, -1, -1)]
        assert signs[64 * word : 64 * word + 64].tolist() == [2.0 * bit - 1 for bit in bits]


def test_signs_are_alike_nowhere():
    """Rows, columns, blocks and seeds of the matrix agree in half of their signs."""
    signs = Projection(512, seed=0).signs(0, 512)
    others = (signs.roll(1, 0), signs.roll(1, 1), Projection(512, 0).signs(1, 512), Projection(512, 1).signs(0, 512))
    assert all(abs(float((signs * other).mean())) < 5 / 512 for other in (torch.ones(1), *others))


def test_projected_rows_do_not_depend_on_each_other():
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 501)).astype(np.float32))
    projection = Projection(32, seed=0)
    together = projection.project(rows)
    assert all(torch.equal(projection.project(rows[i : i + 1])[0], together[i]) for i in (0, 15, 16, 39))


# ---- gradients ----


def test_row_gradients_against_the_models_own_logits(warm):
    epoch, table = warm
    features = GradientFeatures(table, epoch.checkpoint(), Projection(64, 0), adam=False)
    for index in (0, 5, 11):
        expected = plain_gradient(epoch, table, index)
        found = features.gradient(epoch.bundle, index).numpy()
        assert np.allclose(found, np.concatenate([expected[n].ravel() for n in features.checkpoint.weights]), atol=1e-5)
        assert np.abs(found).max() > 1e-4


def test_adam_steps_by_name_and_with_epsilon_inside(warm):
    """A plain loop over names; a checkpoint whose moments lie in another order gives the same."""
    epoch, table = warm
    saved = epoch.checkpoint()
    assert all(float(second.max()) > 0 for second in saved.exp_avg_sq.values())
    expected = []
    for name, gradient in plain_gradient(epoch, table, 3).items():
        first, second = saved.exp_avg[name].double().numpy(), saved.exp_avg_sq[name].double().numpy()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        expected.append((name, first / np.sqrt(second + 1e-8)))
    by_name = dict(expected)
    found = GradientFeatures(table, saved, Projection(64, 0), adam=True).gradient(epoch.bundle, 3).numpy()
    assert np.allclose(found, np.concatenate([by_name[name].ravel() for name in saved.weights]), atol=1e-3)
    turned = replace(
        saved, exp_avg=dict(reversed(saved.exp_avg.items())), exp_avg_sq=dict(reversed(saved.exp_avg_sq.items()))
    )
    again = GradientFeatures(table, turned, Projection(64, 0), adam=True).gradient(epoch.bundle, 3).numpy()
    assert (again == found).all()


def test_features_have_unit_length_and_depend_on_the_row_alone(warm, context):
    epoch, table = warm
    scoring = epoch.scoring(context())
    measure = GradientFeatures(table, epoch.checkpoint(), Projection(64, 0), adam=True)
    found = scoring.measure(table, "a", measure)
    assert np.allclose([np.linalg.norm(vector) for vector in found], 1, atol=1e-5)
    one = replace(scoring, batch_tokens=1).measure(table, "b", measure)
    assert all((a == b).all() for a, b in zip(found, one, strict=True))


# ---- the scorer ----


def test_influence_lies_within_one(rows, make_pool, context, queries):
    ctx = context(select="less", shared=queries(rows[20:22], rows[22:24]))
    found = Less(**SMALL).score(make_pool(rows[:16]), ctx)["less"]
    assert found.shape == (16,) and (np.abs(found) <= 1 + 1e-5).all() and found.std() > 0
    similarity = ctx.scorer.similarity
    assert similarity.matrix.dtype == np.float32 and similarity.task.tolist() == [0, 0, 1, 1]
    assert np.allclose(np.linalg.norm(ctx.scorer.embeddings, axis=1), 1, atol=1e-4)


def test_influence_is_the_weighted_sum_over_the_epochs(rows, make_pool, context, queries):
    """Epoch by epoch with features of their own, weighted by the mean learning rates."""
    shared, pool = queries(rows[20:22]), make_pool(rows[:12])
    ctx = context(select="less", shared=shared)
    scorer = Less(**SMALL)
    scorer.score(pool, ctx)
    again = context(select="less", shared=shared)
    table, places = scorer._rows(pool, again)
    wanted = prepared_rows(make_pool(rows[20:22]), again).table
    rates, sums = [], np.zeros((2, 12))
    with closing(scorer._warm_up(4).run(table.rows(scorer._warm_up_rows(pool, places, again)), again)) as epochs:
        for epoch in epochs:
            saved, projection = epoch.checkpoint(), Projection(256, 0)
            f = [
                projection.project(GradientFeatures(table, saved, projection, True).gradient(epoch.bundle, i)[None])[0]
                for i in range(12)
            ]
            g = [
                projection.project(GradientFeatures(wanted, saved, projection, False).gradient(epoch.bundle, i)[None])[
                    0
                ]
                for i in range(2)
            ]
            rates.append(epoch.learning_rate)
            sums += [[float(torch.cosine_similarity(q, z, dim=0)) * epoch.learning_rate for z in f] for q in g]
    weights = np.array(rates) / sum(rates)
    assert weights.sum() == pytest.approx(1) and len(rates) == 2 and min(rates) > 0
    assert np.allclose(ctx.scorer.similarity.matrix, sums / sum(rates), atol=1e-4)


def test_a_row_equal_to_a_query_scores_one_by_plain_gradients(rows, make_pool, context, queries):
    ctx = context(select="less", shared=queries([rows[4]]))
    found = Less(**SMALL | {"epochs": 1, "row_gradient": "plain"}).score(make_pool(rows[:12]), ctx)["less"]
    assert found[4] == pytest.approx(1, abs=1e-5) and np.argmax(found) == 4


def test_the_scale_of_query_gradients_does_not_matter(warm, monkeypatch):
    epoch, table = warm
    measure = GradientFeatures(table, epoch.checkpoint(), Projection(64, 0), adam=False)
    batch = gradients.aligned_batch(table, [0, 1, 2], False, epoch.bundle)
    before = np.stack(measure(epoch.bundle, batch))
    plain = GradientFeatures.gradient
    monkeypatch.setattr(GradientFeatures, "gradient", lambda self, bundle, index: 1000 * plain(self, bundle, index))
    assert np.allclose(before, measure(epoch.bundle, batch), atol=1e-6)


def test_scores_do_not_depend_on_the_order_of_the_pool(rows, make_pool, context, queries):
    order = np.random.default_rng(0).permutation(12)
    shared = queries(rows[20:22])
    one = Less(**SMALL).score(make_pool(rows[:12]), context(select="less", shared=shared))["less"]
    other = Less(**SMALL).score(make_pool([rows[i] for i in order]), context(select="less", shared=shared))["less"]
    assert np.allclose(other, one[order], atol=1e-6)


def test_the_model_is_left_as_it_was(rows, make_pool, context, queries, bundle):
    before = {name: p.clone() for name, p in bundle.model.named_parameters()}
    Less(**SMALL).score(make_pool(rows[:8]), context(select="less", shared=queries(rows[20:22])))
    after = dict(bundle.model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_mean_over_queries_then_highest_task():
    matrix = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    task = np.array([0, 0, 1, 1, 1])
    expected = [max(np.mean([matrix[q, z] for q in range(5) if task[q] == t]) for t in (0, 1)) for z in range(4)]
    assert np.allclose(task_influence(Similarity(matrix, task)), expected)


def test_both_pickers_go_with_it(rows, make_pool, context, queries):
    ctx = context(select="less", shared=queries(rows[20:23]))
    pool = make_pool(rows[:16])
    columns = Less(**SMALL).score(pool, ctx)
    table = Table(columns, np.ones(16, int), pool, ctx.scorer.embeddings, ctx.scorer.similarity)
    best = TopK().pick(table, np.arange(16), "less", Budget(rows=4), ctx)
    assert best.tolist() == np.argsort(-columns["less"], kind="stable")[:4].tolist()
    turns = RoundRobin().pick(table, np.arange(16), "less", Budget(rows=4), ctx)
    assert turns[0] == np.argmax(ctx.scorer.similarity.matrix[0]) and len(set(turns.tolist())) == 4


def test_rows_that_training_drops_have_no_score(rows, make_pool, context, queries):
    from ftrun.config.settings import DataConfig

    long = {**rows[0], "output": "yes no " * 80}
    ctx = context(select="less", shared=queries(rows[20:22]), data=DataConfig(max_length=80, overlong="drop"))
    found = Less(**SMALL).score(make_pool([*rows[:5], long, *rows[6:12]]), ctx)["less"]
    assert np.flatnonzero(np.isnan(found)).tolist() == [5] and "max_length" in ctx.scorer.reasons[5]
    ctx = context(select="less", shared=queries([rows[20], long]), data=DataConfig(max_length=80, overlong="drop"))
    with pytest.raises(DataError, match="have no gradient"):
        Less(**SMALL).score(make_pool(rows[:12]), ctx)


def test_features_that_memory_cannot_hold(rows, make_pool, context, queries, monkeypatch):
    monkeypatch.setattr(less, "available_bytes", lambda device: 1e4)
    with pytest.raises(ResourceError, match="projected gradients of 14 rows"):
        Less(**SMALL).score(make_pool(rows[:12]), context(select="less", shared=queries(rows[20:22])))


@pytest.mark.parametrize(
    "knobs", [{"warmup_rows": 0.0}, {"warmup_rows": 2.0}, {"epochs": 0}, {"dimension": 0}], ids=repr
)
def test_knobs_out_of_range(knobs, rows, make_pool, context):
    with pytest.raises(ConfigError):
        Less(**knobs).score(make_pool(rows[:4]), context(select="less"))
