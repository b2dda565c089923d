"""The engine: right numbers, whatever the batches, the order, the processes and the kills."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ftrun.errors import ComponentError, DataError
from ftrun.models.fast import packs_for_free, speed_up
from ftrun.training.scoring import Scoring, segments


@pytest.fixture
def texts() -> list[tuple[list[int], list[int]]]:
    random = np.random.default_rng(3)
    made = []
    for _ in range(40):
        context, target = random.integers(0, 7), random.integers(1, 60)
        made.append((random.integers(10, 300, context).tolist(), random.integers(10, 300, target).tolist()))
    return made


@pytest.fixture
def scoring(bundle, context):
    def make(**changes) -> Scoring:
        ctx = context()
        return Scoring(**({"load": lambda: bundle, "team": ctx.team, "report": ctx.report} | changes))

    return make


def test_token_nll_equals_a_loop_over_single_texts(scoring, texts, bundle, plain_nll):
    table = segments(texts)
    scored = scoring().token_nll(table)
    for index, (before, target) in enumerate(texts):
        mine = scored[table.offsets[index] : table.offsets[index + 1]]
        losses = np.concatenate([[np.nan], plain_nll(bundle, before + target)])
        losses[: len(before)] = np.nan
        np.testing.assert_allclose(mine, losses, atol=1e-5)


def test_mean_runs_over_the_predictable_targets(scoring, texts, bundle, plain_nll):
    means = scoring().mean_nll(segments(texts))
    for mean, (before, target) in zip(means, texts, strict=True):
        losses = plain_nll(bundle, before + target)[max(0, len(before) - 1) :]
        assert mean == pytest.approx(losses.mean(), abs=1e-5) if len(losses) else np.isnan(mean)


def test_the_first_token_without_context_has_no_loss(scoring):
    means = scoring().mean_nll(segments([([], [20]), ([], []), ([15], []), ([15], [20])]))
    assert np.isnan(means).tolist() == [True, True, True, False]


@pytest.mark.parametrize("batch_tokens", [1, 512, 4096])
def test_batches_do_not_matter(scoring, texts, batch_tokens):
    table = segments(texts)
    expected = scoring().mean_nll(table)
    np.testing.assert_allclose(scoring(batch_tokens=batch_tokens).mean_nll(table), expected, atol=1e-6)


def test_packed_texts_score_as_they_do_alone(scoring, texts, bundle, monkeypatch):
    """Joining texts saves padding and changes nothing; models that cannot keep them apart at no cost get rows of their own."""
    speed_up(bundle.model)
    assert packs_for_free(bundle.model, bundle.architecture)
    table = segments(texts)
    packed = scoring(batch_tokens=200).token_nll(table)
    monkeypatch.setattr("ftrun.training.scoring.packs_for_free", lambda model, architecture: False)
    apart = scoring(batch_tokens=200).token_nll(table)
    np.testing.assert_allclose(packed, apart, atol=1e-6)


def test_order_does_not_change_a_bit(scoring, texts):
    expected = scoring(batch_tokens=512).mean_nll(segments(texts))
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = scoring(batch_tokens=512).mean_nll(segments([texts[i] for i in order]))
    np.testing.assert_array_equal(shuffled, expected[order])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_do_not_change_a_bit(scoring, texts, together, processes):
    table = segments(texts)
    expected = scoring(batch_tokens=256).mean_nll(table)

    def work(team):
        engine = scoring(batch_tokens=256, team=team)
        return engine.mean_nll(table), engine.computed

    results = together(processes, work)
    for means, computed in results:
        np.testing.assert_array_equal(means, expected)
        assert computed > 0
    distinct = len({(tuple(before), tuple(target)) for before, target in texts if len(before) + len(target) > 1})
    assert sum(computed for _, computed in results) == distinct


def test_equal_texts_are_computed_once(scoring, texts):
    engine = scoring()
    once = engine.token_nll(segments(texts))
    before = engine.computed
    again = engine.token_nll(segments(texts + texts))
    assert engine.computed == before
    np.testing.assert_array_equal(again, np.concatenate([once, once]))


def test_same_ids_with_other_targets_are_another_text(scoring):
    engine = scoring()
    whole, part = engine.mean_nll(segments([([11], [12, 13])])), engine.mean_nll(segments([([11, 12], [13])]))
    assert whole != part
    assert engine.computed == 2


def test_a_killed_scoring_goes_on_where_it_stopped(scoring, texts, tmp_path, monkeypatch):
    table, kept = segments(texts), {"batch_tokens": 256, "shards": tmp_path / "shards", "shard_seconds": 0.0}
    expected = scoring(batch_tokens=256).mean_nll(table)
    killed = scoring(**kept)
    compute, calls = Scoring._compute, []

    def dies(self, *arguments):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)
        return compute(self, *arguments)

    monkeypatch.setattr(Scoring, "_compute", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.mean_nll(table)
    monkeypatch.undo()
    assert killed.computed > 0
    resumed = scoring(**kept)
    np.testing.assert_array_equal(resumed.mean_nll(table), expected)
    total = scoring(batch_tokens=256)
    total.mean_nll(table)
    assert killed.computed + resumed.computed == total.computed
    resumed.discard()
    assert not (tmp_path / "shards").exists()


def test_shards_serve_other_batches_and_more_processes(scoring, texts, together, tmp_path):
    table, shards = segments(texts), tmp_path / "shards"
    first = scoring(batch_tokens=256, shards=shards).mean_nll(table)

    def work(team):
        engine = scoring(batch_tokens=1024, shards=shards, team=team)
        return engine.mean_nll(table), engine.computed

    for means, computed in together(2, work):
        np.testing.assert_array_equal(means, first)
        assert computed == 0


def test_a_damaged_shard_is_scored_again(scoring, texts, tmp_path):
    table = segments(texts)
    expected = scoring(shards=tmp_path).mean_nll(table)
    for file in tmp_path.rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:-40])
    engine = scoring(shards=tmp_path)
    np.testing.assert_array_equal(engine.mean_nll(table), expected)
    assert engine.computed > 0
    assert "damaged" in engine.report.warnings[0]


def test_shards_of_another_model_are_not_used(scoring, texts, tmp_path, bundle):
    table = segments(texts)
    scoring(shards=tmp_path).mean_nll(table)
    other = dataclasses.replace(bundle, fingerprint="other")
    engine = scoring(shards=tmp_path, load=lambda: other)
    engine.mean_nll(table)
    assert engine.computed > 0


def test_a_measure_of_ones_own(scoring, texts):
    found = scoring().measure(
        segments(texts), "length", lambda bundle, batch: [np.ones(int(n)) for n in (batch.sequence >= 0).sum(1)]
    )
    assert [len(value) for value in found] == [len(before) + len(target) for before, target in texts]


def test_a_text_beyond_the_context_is_refused(scoring):
    with pytest.raises(DataError, match="600 tokens is longer than the 512"):
        scoring().mean_nll(segments([([1] * 300, [2] * 300)]))


def test_a_loss_that_is_not_finite_is_refused(scoring, bundle):
    bundle.model.model.norm.weight.data[:] = float("nan")
    with pytest.raises(ComponentError, match="not finite"):
        scoring().mean_nll(segments([([1], [2])]))


def test_the_model_keeps_its_mode(scoring, bundle):
    bundle.model.train()
    scoring().mean_nll(segments([([1], [2])]))
    assert bundle.model.training
