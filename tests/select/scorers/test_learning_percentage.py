"""How late a row is learned, and the picker that takes the first part of every cluster."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from ftrun.errors import ConfigError
from ftrun.models.fast import speed_up
from ftrun.select.base import Budget, Table
from ftrun.select.pickers.first_chunk import FirstChunk, in_chunks
from ftrun.select.scorers.learning_percentage import LearningPercentage
from ftrun.select.trials.inner import InnerTraining

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
FAST = {"learning_rate": 1e-2, "batch_size": 8}


@pytest.fixture
def plain_rows(rows):
    return [{**row, "input": ""} for row in rows]


def test_the_trace_is_the_perplexity_of_each_epochs_model(plain_rows, make_pool, context, bundle, monkeypatch):
    """Response and end token under the alpaca prompt, computed one row at a time by the model of the moment."""
    speed_up(bundle.model)
    tokenizer, traced = bundle.tokenizer, []

    def perplexities(model) -> list[float]:
        found = []
        for row in plain_rows:
            prompt = tokenizer(ALPACA.format(row["instruction"])).input_ids
            answer = [*tokenizer(row["output"]).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
            losses = -torch.log_softmax(logits, -1)[torch.arange(len(answer)), torch.tensor(answer)]
            found.append(float(losses.mean().exp()))
        return found

    plain = InnerTraining.run

    def watched(self, table, ctx, title=""):
        traced.append(perplexities(bundle.model))
        for epoch in plain(self, table, ctx, title):
            traced.append(perplexities(epoch.bundle.model))
            yield epoch

    monkeypatch.setattr(InnerTraining, "run", watched)
    columns = LearningPercentage(guard="clip", **FAST).score(make_pool(plain_rows), context())
    for number in range(4):
        np.testing.assert_allclose(columns[f"ppl_{number}"], traced[number], rtol=1e-4)
    p0, p1, _, p3 = np.array(traced)
    assert (p0 > p3).all() and not np.allclose(p1, p3)
    np.testing.assert_allclose(columns["learning_percentage"], np.clip((p0 - p1) / (p0 - p3), 0, 1), rtol=1e-3)
    np.testing.assert_allclose(columns["late"], 1 - columns["learning_percentage"])


def test_the_approximate_form_trains_one_epoch(rows, make_pool, context):
    columns = LearningPercentage(form="approximate", **FAST).score(make_pool(rows), context())
    assert columns.keys() == {"late", "learning_percentage", "ppl_0", "ppl_1"}
    np.testing.assert_allclose(columns["learning_percentage"], 1 - columns["ppl_1"] / columns["ppl_0"], rtol=1e-9)
    assert (columns["learning_percentage"] <= 1).all()


def test_unlearned_rows_are_clipped_or_dropped_and_named(rows, make_pool, context):
    pool = make_pool(rows[:6]).subset([1, 2, 3, 4, 5])
    trace = [np.array(p, float) for p in ([4, 4, 4, 4, np.nan], [3, 5, 1, 3, np.nan], [2, 4, 2, 6, np.nan])]
    said = {}
    for guard in ("clip", "drop"):
        ctx = context()
        found = LearningPercentage(guard=guard).percentage(trace, pool, ctx)
        said[guard] = (found.tolist(), dict(ctx.scorer.reasons))
        stream = ctx.report.console.file
        assert isinstance(stream, io.StringIO) and "2 of 5 rows were not learned" in stream.getvalue()
        assert "2, 4" in stream.getvalue()
    assert said["clip"][0][:4] == [0.5, 0, 1, 0] and np.isnan(said["clip"][0][4])
    assert said["drop"][0][0] == 0.5 and said["drop"][0][2] == 1.5 and np.isnan(said["drop"][0])[[1, 3, 4]].all()
    assert said["clip"][1] == {} and set(said["drop"][1]) == {1, 3}


def test_rows_without_room_or_answer_have_no_score(rows, make_pool, context):
    long = {"instruction": "the dog " * 200, "input": "", "output": "yes"}
    ctx = context()
    columns = LearningPercentage(guard="clip", max_length=220, **FAST).score(make_pool([*rows, long]), ctx)
    assert np.isnan(columns["late"]).tolist() == [False] * 24 + [True]
    assert ctx.scorer.reasons == {24: "the prompt fills max_length=220"}


def test_scores_do_not_depend_on_the_order_of_the_rows(rows, make_pool, context, bundle):
    speed_up(bundle.model)  # as every loaded model is
    order = np.random.default_rng(0).permutation(24)
    plain = LearningPercentage(guard="clip", **FAST).score(make_pool(rows), context())
    ctx = context()
    ctx.scorer.shards = ctx.out / "elsewhere"
    mixed = LearningPercentage(guard="clip", **FAST).score(make_pool([rows[place] for place in order]), ctx)
    for name in plain:
        np.testing.assert_array_equal(plain[name][order], mixed[name])


def test_one_epoch_of_one_is_refused():
    with pytest.raises(ConfigError, match="nothing left to learn"):
        LearningPercentage(epochs=1)
    assert LearningPercentage(form="approximate", epochs=1).trained_epochs == 1


@pytest.mark.parametrize("knob", ["epochs", "max_length", "learning_rate", "batch_size", "r"])
def test_impossible_knobs_are_refused(knob):
    with pytest.raises(ConfigError, match=rf"select\.{knob} must be above 0"):
        LearningPercentage(**{knob: 0})


# ---- the picker ----


@pytest.mark.parametrize("chunks", [1, 3, 10, 20, 100])
def test_every_cluster_gives_its_first_chunk(chunks):
    """As numpy cuts a sorted list into near-equal parts: ceil(n / m) rows of each cluster, lowest LP first."""
    random = np.random.default_rng(chunks)
    label, score, place = random.integers(0, 7, 200), random.normal(size=200), random.permutation(200)
    order, chunk = in_chunks(label, score, place, chunks)
    assert sorted(order.tolist()) == list(range(200))
    for number in range(7):
        members = np.flatnonzero(label == number)
        members = members[np.argsort(-score[members])]
        parts = np.array_split(members, chunks)
        for at, part in enumerate(parts):
            assert sorted(order[(chunk == at) & np.isin(order, members)].tolist()) == sorted(part.tolist())
        assert len(parts[0]) == -(-len(members) // chunks)


def test_a_monotone_transform_changes_nothing_within_a_cluster():
    random = np.random.default_rng(0)
    label, score, place = random.integers(0, 5, 100), random.normal(size=100), np.arange(100)
    chosen = []
    for values in (score, np.exp(score), 3 * score + 1):
        order, chunk = in_chunks(label, values, place, 10)
        chosen.append(set(order[chunk == 0].tolist()))
    assert chosen[0] == chosen[1] == chosen[2]


@pytest.fixture
def pick(make_pool, context):
    def run(knobs, budget, rows=60, keep=None):
        random = np.random.default_rng(5)
        pool = make_pool([{"text": f"row {i}"} for i in range(rows)])
        vectors = random.normal(size=(rows, 8)).astype(np.float32)
        table = Table({"late": random.normal(size=rows)}, random.integers(5, 50, rows), pool, vectors)
        candidates = np.arange(rows) if keep is None else keep
        return FirstChunk(**knobs).pick(table, candidates, "late", budget, context()), table

    return run


def test_with_one_cluster_it_is_the_top(pick):
    picked, table = pick({"clusters": 1}, Budget(rows=6))
    assert picked.tolist() == np.argsort(-table.columns["late"])[:6].tolist()


def test_the_budget_is_met_and_lies_in_the_authors_choice(pick):
    exact, table = pick({"clusters": 12}, Budget(rows=6))
    whole, _ = pick({"clusters": 12, "rounding": "up"}, Budget(rows=6))
    assert len(exact) == 6 and len(whole) >= 12 and set(exact.tolist()) <= set(whole.tolist())
    assert len(set(whole.tolist())) == len(whole)
    many, _ = pick({"clusters": 12}, Budget(rows=50))
    assert len(many) == 50
    tokens, _ = pick({"clusters": 12}, Budget(tokens=300))
    assert 250 < table.lengths[tokens].sum() <= 300


def test_rows_that_the_filter_left_out_stay_out(pick):
    keep = np.arange(0, 60, 2)
    picked, _ = pick({"clusters": 4}, Budget(rows=10), keep=keep)
    assert len(picked) == 10 and set(picked.tolist()) <= set(keep.tolist())
