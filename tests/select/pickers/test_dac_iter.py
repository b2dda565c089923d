"""Rounds of choosing and training: what is drawn, what is measured, and how weights follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ftrun
from ftrun.config.settings import SelectConfig
from ftrun.data.render import Renderer
from ftrun.errors import ConfigError
from ftrun.models.fast import speed_up
from ftrun.select.base import Budget, Table
from ftrun.select.geometry.cluster import in_turns
from ftrun.select.pickers.dac_iter import DacIter, cluster_means, part_of, weighted_turns
from ftrun.select.trials.rewards import likelihood, reward

QUICK = {"clusters": 4, "max_new_tokens": 4, "epochs": 1, "batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture
def table(rows, make_pool, bundle):
    speed_up(bundle.model)
    vectors = np.eye(4, dtype=np.float32)[np.array([0] * 12 + [1] * 6 + [2] * 4 + [3] * 2)]
    return Table({}, np.arange(24) + 5, make_pool(rows), vectors)


# ---- sharing out ----


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 1000))
def test_equal_weights_deal_in_turns(labels, _):
    label = np.unique(labels, return_inverse=True)[1]
    weights = np.full(label.max() + 1, 1 / (label.max() + 1))
    assert weighted_turns(label, weights).tolist() == in_turns(label).tolist()


def test_every_prefix_holds_the_clusters_by_weight():
    random = np.random.default_rng(0)
    label = random.permutation(np.repeat(np.arange(4), 200))
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    order = weighted_turns(label, weights)
    for length in (20, 40, 100, 300):
        counts = np.bincount(label[order[:length]], minlength=4)
        assert np.abs(counts - weights * length).max() <= 1


def test_a_small_cluster_leaves_its_turns_to_the_others():
    label = np.array([0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    order = weighted_turns(label, np.array([0.9, 0.05, 0.05]))
    assert sorted(order.tolist()) == list(range(14))
    assert label[order[:2]].tolist() == [0, 0]
    assert np.bincount(label[order[:10]]).tolist() == [2, 4, 4]


# ---- weights ----


def test_weights_are_a_softmax_of_the_scores():
    scores, before = np.array([0.5, -1.0, 2.0]), np.array([0.2, 0.2, 0.6])
    found = DacIter().reweighed(scores, before)
    expected = [np.exp(s) / sum(np.exp(other) for other in scores) for s in scores]
    np.testing.assert_allclose(found, expected)
    product = DacIter(weighting="product").reweighed(scores, before)
    np.testing.assert_allclose(product, before * expected / (before * expected).sum())
    assert found.sum() == pytest.approx(1) and product.sum() == pytest.approx(1)


def test_equal_scores_give_equal_weights_and_an_unknown_cluster_the_mean():
    before = np.array([0.7, 0.1, 0.1, 0.1])
    np.testing.assert_allclose(DacIter().reweighed(np.full(4, -3.0), before), 0.25)
    found = DacIter().reweighed(np.array([1.0, np.nan, 3.0, 2.0]), before)
    assert found[1] == pytest.approx(found[3]) and found.sum() == pytest.approx(1)
    assert DacIter().reweighed(np.full(4, np.nan), before).tolist() == before.tolist()
    assert np.isfinite(DacIter().reweighed(np.array([-900.0, 900.0, 0.0, 0.0]), before)).all()


def test_a_cluster_scores_the_mean_of_its_rows():
    means = cluster_means(np.array([1.0, 3.0, np.nan, 5.0, np.nan]), np.array([0, 0, 0, 2, 1]), 4)
    assert means[[0, 2]].tolist() == [2, 5] and np.isnan(means[[1, 3]]).all()


def test_the_budget_is_spread_over_the_rounds():
    assert [part_of(Budget(rows=10), number, 3).rows for number in (1, 2, 3)] == [3, 6, 10]
    assert [part_of(Budget(tokens=100), number, 3).tokens for number in (1, 2, 3)] == [33, 66, 100]


# ---- rounds ----


@pytest.mark.parametrize("budget", [Budget(rows=10), Budget(tokens=150), Budget(rows=24)])
def test_sets_are_nested_and_follow_the_weights(table, context, budget, monkeypatch):
    """The rows of a round come on top of those before; the cluster whose answers are worst gets the most."""
    seen = []

    def gaps(self, chosen, ctx):
        seen.append(chosen.ids.tolist())
        cluster = table.embeddings[chosen.ids].argmax(1)
        return np.where(cluster == 1, 5.0, 0.0)

    monkeypatch.setattr(DacIter, "gaps", gaps)
    picked = DacIter(**QUICK).pick(table, np.arange(24), "", budget, context()).tolist()
    assert len(set(picked)) == len(picked)
    assert all(picked[: len(part)] == part for part in seen)
    assert len(seen) == 2
    if budget.rows:
        assert len(picked) == budget.rows and [len(part) for part in seen] == [budget.rows // 3, budget.rows * 2 // 3]
    else:
        assert 120 < table.lengths[picked].sum() <= 150
    counts = np.bincount(table.embeddings[picked].argmax(1), minlength=4)
    assert (counts <= [12, 6, 4, 2]).all()
    if budget.rows == 10:
        assert counts[1] == 6  # all of it: the heaviest, and then the rest from the others


def test_the_gap_is_that_of_the_likelihoods(table, rows, context, bundle, plain_nll, monkeypatch):
    """R(gold) - R(generated), both under the untrained model, one row at a time."""
    from ftrun.select.pickers import dac_iter

    written = {}
    plain = dac_iter.rollouts

    def watched(prompts, count, limit, temperature, ctx):
        assert ctx.scorer.bundle.fingerprint != bundle.fingerprint  # the trained model answers
        answers = plain(prompts, count, limit, temperature, ctx)
        written.update({tuple(ids): answer[0] for ids, answer in zip(prompts, answers, strict=True)})
        return answers

    monkeypatch.setattr(dac_iter, "rollouts", watched)
    before = {name: p.clone() for name, p in bundle.model.named_parameters()}
    chosen = table.pool.subset([3, 8, 11])
    found = DacIter(**QUICK).gaps(chosen, context())
    assert all(torch.equal(before[name], p) for name, p in bundle.model.named_parameters())
    renderer = Renderer(bundle.tokenizer)
    for place, record in enumerate(chosen):
        prompt = renderer.prompt_ids(record)

        def rate(answer, prompt=prompt):
            target = [*bundle.tokenizer(answer).input_ids, renderer.end_of_turn]
            return -plain_nll(bundle, prompt + target)[len(prompt) - 1 :].mean()

        gap = rate(rows[record.id]["output"]) - rate(written[tuple(prompt)])
        assert found[place] == pytest.approx(gap, rel=1e-4, abs=1e-5)


def test_rows_without_room_for_an_answer_have_no_gap(table, context):
    ctx = context()
    found = DacIter(**{**QUICK, "max_new_tokens": 500}).gaps(table.pool.subset([1, 2]), ctx)
    assert np.isnan(found).all() and "2 rows are not answered" in ctx.report.console.file.getvalue()


def test_the_same_choice_however_it_is_batched_and_ordered(table, rows, make_pool, context):
    picks = []
    for batch_tokens in (64, 4096):
        ctx = context(shared=SelectConfig(batch_tokens=batch_tokens))
        ctx.scorer.shards = ctx.out / str(batch_tokens)
        picks.append(DacIter(**QUICK).pick(table, np.arange(24), "", Budget(rows=9), ctx).tolist())
    order = np.random.default_rng(2).permutation(24)
    mixed = Table({}, table.lengths[order], make_pool([rows[place] for place in order]), table.embeddings[order])
    ctx = context()
    ctx.scorer.shards = ctx.out / "mixed"
    picks.append(order[DacIter(**QUICK).pick(mixed, np.arange(24), "", Budget(rows=9), ctx)].tolist())
    assert picks[0] == picks[1] and len(set(picks[0])) == 9
    assert sorted(picks[2]) == sorted(picks[0])


@pytest.mark.parametrize("knob", ["rounds", "max_new_tokens", "epochs", "learning_rate", "batch_size", "r"])
def test_impossible_knobs_are_refused(knob):
    with pytest.raises(ConfigError, match=f"needs {knob} above 0") as caught:
        DacIter(**{knob: 0})
    assert caught.value.where == f"select.picker.{knob}=0"


# ---- what rates answers ----


def save_classifier(tiny_dir, folder, labels: int, head: bool = True):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_dir, num_labels=labels)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(folder)
    if not head:
        kept = {name: t for name, t in load_file(folder / "model.safetensors").items() if not name.startswith("score")}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return model.eval()


def test_a_reward_model_rates_the_whole_conversation(table, context, tiny_dir, tmp_path, bundle):
    model = save_classifier(tiny_dir, tmp_path / "reward", 1)
    records = [table.pool[place] for place in range(4)]
    answers = ["yes", "no no", "the dog answers: 3", ""]
    found = reward(str(tmp_path / "reward"), records, answers, context())
    for value, record, answer in zip(found, records, answers, strict=True):
        user = record.messages[0].content
        text = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        with torch.no_grad():
            expected = model(torch.tensor([bundle.tokenizer(text).input_ids])).logits.item()
        assert value == pytest.approx(expected, abs=1e-5)
    assert len(set(found.tolist())) == 4


def test_other_weights_of_the_reward_model_choose_anew(tiny_dir, rows_file, tmp_path, monkeypatch):
    """The stage cache keeps a choice by what the reward model holds, not by where it lies."""
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    knobs = [
        "rounds=2",
        "clusters=3",
        "max_new_tokens=4",
        "epochs=1",
        "batch_size=4",
        f"reward_model={tmp_path}/reward",
    ]
    reused = []
    for number, changed in enumerate((True, False, True)):
        if changed:
            save_classifier(tiny_dir, tmp_path / "reward", 1)
            weights = load_file(tmp_path / "reward/model.safetensors")
            weights["score.weight"] += number
            save_file(weights, tmp_path / "reward/model.safetensors", metadata={"format": "pt"})
        out = tmp_path / f"run{number}"
        words = ["recipe=dac_iter", f"model.path={tiny_dir}", f"data.path={rows_file}", "budget=6", f"out={out}"]
        ftrun.run("select", overrides=[*words, *(f"select.picker.{knob}" for knob in knobs)])
        reused.append("reused" in (out / "ftrun.log").read_text())
    assert reused == [False, True, False]


@pytest.mark.parametrize(("labels", "head", "message"), [(3, True, "has 3 outputs"), (1, False, "no trained head")])
def test_what_is_no_reward_model_is_refused(table, context, tiny_dir, tmp_path, labels, head, message):
    save_classifier(tiny_dir, tmp_path / "reward", labels, head)
    with pytest.raises(ConfigError, match=message):
        reward(str(tmp_path / "reward"), [table.pool[0]], ["yes"], context())


def test_likelihood_of_an_answer_that_fills_the_context_is_of_its_beginning(table, context):
    found = likelihood([table.pool[0], table.pool[0]], ["yes " * 600, "yes " * 700], context())
    assert np.isfinite(found).all() and found[0] == found[1]
