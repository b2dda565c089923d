"""Held-out loss against a plain loop, and its independence of how it is computed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ftrun.data.render import Renderer
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.averages import ratio
from ftrun.evaluation.evaluators.heldout import Heldout


def plain_losses(model, table) -> dict[int, list[float]]:
    """Cross-entropy of every response token, one row at a time, with whole logits."""
    losses = {}
    for index in range(len(table.record)):
        item = table.sequence(index)
        ids = torch.tensor(item.input_ids, dtype=torch.long)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
        every = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        losses[item.record] = [
            float(loss) for loss, weight in zip(every, item.loss_weight[1:], strict=True) if weight > 0
        ]
    return losses


def test_equals_a_plain_loop(bundle, context, table):
    found = Heldout().evaluate(bundle, context(heldout_tokens=table))
    plain = plain_losses(bundle.model, table)
    flat = [loss for losses in plain.values() for loss in losses]
    assert found.metrics["loss"].value == pytest.approx(sum(flat) / len(flat), abs=1e-5)
    assert found.metrics["loss"].n == 11, "the row without a response counts nowhere"
    for prediction in found.predictions:
        losses = plain[prediction["id"]]
        assert prediction["tokens"] == len(losses)
        assert prediction["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_perplexity_is_exp_of_the_loss(bundle, context, table):
    metrics = Heldout().evaluate(bundle, context(heldout_tokens=table)).metrics
    assert metrics["perplexity"].value == math.exp(metrics["loss"].value)
    assert metrics["perplexity"].stderr == pytest.approx(metrics["perplexity"].value * metrics["loss"].stderr)
    assert not metrics["perplexity"].higher_is_better and not metrics["loss"].higher_is_better


def test_token_accuracy_counts_first_ranks(bundle, context, table):
    right = total = 0
    for index in range(len(table.record)):
        item = table.sequence(index)
        ids = torch.tensor(item.input_ids, dtype=torch.long)
        with torch.no_grad():
            best = bundle.model(input_ids=ids[None]).logits[0, :-1].argmax(-1)
        asked = torch.tensor(item.loss_weight[1:]) > 0
        right += int((best == ids[1:])[asked].sum())
        total += int(asked.sum())
    metric = Heldout().evaluate(bundle, context(heldout_tokens=table)).metrics["token_accuracy"]
    assert metric.value == pytest.approx(right / total, abs=1e-12)


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_batch_size_and_order_change_nothing(bundle, context, table, batch_tokens):
    reference = Heldout().evaluate(bundle, context(heldout_tokens=table))
    shuffled = table.rows(np.random.default_rng(1).permutation(len(table)))
    found = Heldout(batch_tokens=batch_tokens).evaluate(bundle, context(heldout_tokens=shuffled))
    for name, metric in reference.metrics.items():
        assert found.metrics[name].value == pytest.approx(metric.value, rel=1e-6), name
        assert found.metrics[name].stderr == pytest.approx(metric.stderr, rel=1e-5), name


def test_every_process_finds_the_same_bits(bundle, context, table, alone):
    reference = Heldout(batch_tokens=64).evaluate(bundle, context(heldout_tokens=table))
    shares = []
    for rank in range(3):
        team = alone(rank, 3)
        Heldout(batch_tokens=64).evaluate(bundle, context(team, heldout_tokens=table))
        shares.append(team.given[0])
    assert all(shares), "each process has work"
    for rank in range(3):
        team = alone(rank, 3, gathered=[shares])
        found = Heldout(batch_tokens=64).evaluate(bundle, context(team, heldout_tokens=table))
        assert found.metrics == reference.metrics
        assert found.predictions == reference.predictions


def test_of_a_pair_the_chosen_answer_counts(bundle, context, table):
    pairs = TokenTable.from_sequences([table.sequence(index) for index in range(12)], sequences_per_row=2)
    chosen = table.rows(np.arange(0, 12, 2))
    found = Heldout().evaluate(bundle, context(heldout_tokens=pairs))
    assert found.metrics == Heldout().evaluate(bundle, context(heldout_tokens=chosen)).metrics


def test_ratio_against_the_bootstrap():
    """The linearised standard error is close to that of resampled rows."""
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 50, 400).astype(float)
    totals = counts * (2 + generator.normal(0, 0.5, 400))
    value, error = ratio(totals, counts)
    assert value == pytest.approx(totals.sum() / counts.sum())
    drawn = generator.integers(0, 400, (4000, 400))
    assert error == pytest.approx((totals[drawn].sum(1) / counts[drawn].sum(1)).std(), rel=0.05)
    assert ratio(np.array([6.0]), np.array([3.0])) == (2.0, None)


def test_equal_rows_leave_no_error():
    assert ratio(np.array([4.0, 8.0]), np.array([2.0, 4.0])) == (2.0, 0.0)


def test_without_rows_it_says_why(bundle, context):
    with pytest.raises(ConfigError, match="none were held out"):
        Heldout().evaluate(bundle, context())


def test_prompts_have_nothing_to_predict(bundle, context, table):
    empty = table.with_weights(np.zeros_like(table.loss_weight))
    with pytest.raises(ConfigError, match="no response token"):
        Heldout().evaluate(bundle, context(heldout_tokens=empty))


def test_a_row_beyond_the_context_is_named(bundle, context):
    long = TokenTable.from_sequences([Sequence(np.full(600, 7, np.int32), np.ones(600, np.float32), 42)])
    with pytest.raises(DataError, match="row 42 has 600 tokens"):
        Heldout().evaluate(bundle, context(heldout_tokens=long))


def test_pieces_of_a_text_are_one_row(bundle, context, table):
    sequences = [table.sequence(index) for index in range(len(table))]
    cut = [piece for sequence in sequences for piece in Renderer(bundle.tokenizer).pieces(sequence, 8)]
    pieces = TokenTable.from_sequences(cut)
    assert len(pieces) > len(table)
    found = Heldout().evaluate(bundle, context(heldout_tokens=pieces))
    losses = [
        loss
        for sequence in cut
        for loss in plain_losses(bundle.model, TokenTable.from_sequences([sequence]))[sequence.record]
    ]
    assert found.metrics["loss"].value == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    whole = Heldout().evaluate(bundle, context(heldout_tokens=table))
    counts = [[(row["id"], row["tokens"]) for row in evaluation.predictions] for evaluation in (found, whole)]
    assert counts[0] == counts[1]
    assert found.metrics["loss"].n == whole.metrics["loss"].n == 11
