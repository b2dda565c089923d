"""Reasoning-highlighted fine-tuning: its shuffle, its classes and its weights against plain arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import ftrun
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.objectives.sft import Sft
from ftrun.tokens.policies.rft_shad import RftShad, shuffled, with_prompts

NAME = "shad_minus_base"


@pytest.fixture
def classed(table):
    """The table with a class for every trained token; row 3 has boilerplate only, row 4 reasoning only."""
    difference = np.random.default_rng(5).normal(size=len(table.input_ids)).astype(np.float32)
    difference[table.offsets[0] + 8] = 0  # nothing changed: boilerplate
    for row, sign in ((3, -1), (4, 1)):
        span = slice(table.offsets[row], table.offsets[row + 1])
        difference[span] = sign * np.abs(difference[span])
    difference[np.asarray(table.loss_weight) == 0] = np.nan
    return table.with_remembered({NAME: difference})


def classes(table, row) -> np.ndarray:
    span = slice(table.offsets[row] + 1, table.offsets[row + 1])
    return table.remembered[NAME][span][np.asarray(table.loss_weight[span]) > 0] > 0


def expected(table, losses, tau) -> tuple[float, dict[int, np.ndarray]]:
    """The loss of the step, and each token's share of its sample's loss."""
    total, shares = 0.0, {}
    for row, nll in losses.items():
        reasoning = classes(table, row)
        means = {kind: nll[reasoning == kind].mean() for kind in (False, True) if (reasoning == kind).any()}
        weights = {kind: math.exp(mean / tau) for kind, mean in means.items()}
        weights = {kind: weight / sum(weights.values()) for kind, weight in weights.items()}
        total += sum(weights[kind] * means[kind] for kind in means)
        shares[row] = np.array([weights[kind] / (reasoning == kind).sum() for kind in reasoning.tolist()])
    return total / len(losses), shares


@pytest.mark.parametrize("cut", [{"batch_tokens": 1}, {"batch_tokens": 64}, {"batch_tokens": 64, "packing": True}])
@pytest.mark.parametrize("tau", [0.05, 3.0])
def test_the_loss_is_the_papers(cut, tau, classed, make_views, factors_of, plain_losses):
    views = make_views(classed, **cut)
    factors = factors_of(RftShad(tau=tau), views)
    loss, shares = expected(classed, plain_losses(classed), tau)
    n = sum(map(len, shares.values()))
    for row, share in shares.items():
        np.testing.assert_allclose(factors[row], share * n / len(shares), rtol=1e-3)
    value = sum(float(Sft().loss(view).value.detach()) for view in views)
    assert value / sum(Sft().count(view.batch) for view in views) == pytest.approx(loss, rel=1e-4)


def test_the_weights_of_a_sample_sum_to_one(classed, make_views):
    (view,) = make_views(classed, 10_000)
    shares = RftShad().shares(view.token_nll.detach(), view.batch)
    np.testing.assert_allclose(view.per_sequence_sum(shares).numpy(), 1, rtol=1e-5)


@pytest.mark.parametrize("how", ["equal losses", "endless tau"])
def test_half_each(how, classed, make_views):
    """Equal losses, or a temperature without end: half for each class, whatever their sizes."""
    (view,) = make_views(classed, 10_000)
    nll = view.token_nll.detach()
    policy = RftShad(tau=1e9) if how == "endless tau" else RftShad()
    shares = policy.shares(nll.new_full(nll.shape, 2.0) if how == "equal losses" else nll, view.batch)
    for number, row in enumerate(view.batch.table_index.tolist()):
        reasoning, mine = classes(classed, row), shares[view.batch.target_sequence == number].numpy()
        if reasoning.any() and not reasoning.all():
            assert mine[reasoning].sum() == pytest.approx(0.5, rel=1e-5)
        else:
            np.testing.assert_allclose(mine, 1 / len(mine), rtol=1e-5)


@pytest.mark.parametrize("rows", [2, 3, 12])
def test_no_response_keeps_its_prompt(rows, table):
    some = table.rows(np.arange(12 - rows, 12))
    mixed, cut = shuffled(some, 0, 10_000)
    prompts, responses = {}, {}
    for row in range(rows):
        item = some.sequence(row)
        start = int((item.loss_weight > 0).argmax())
        prompts[tuple(item.input_ids[:start].tolist())] = row
        responses[tuple(item.input_ids[start:].tolist()), tuple(item.loss_weight[start:].tolist())] = row
    dealt = []
    for row in range(rows):
        item = mixed.sequence(row)
        start = int((item.loss_weight > 0).argmax())
        own = prompts[tuple(item.input_ids[:start].tolist())]
        other = responses[tuple(item.input_ids[start:].tolist()), tuple(item.loss_weight[start:].tolist())]
        assert own != other
        dealt.append((own, other))
    assert sorted(own for own, _ in dealt) == sorted(other for _, other in dealt) == list(range(rows))
    assert cut == 0


def test_long_ones_are_cut_and_counted(table):
    whole, _ = shuffled(table, 0, 10_000)
    mixed, cut = shuffled(table, 0, 12)
    assert cut == (whole.lengths > 12).sum() > 0 and mixed.lengths.max() == 12


def test_classes_come_from_a_model_that_learned_shuffled_rows(table, context):
    ctx = context("rft_shad")
    policy = RftShad(shuffled_rows=0.5, shad_epochs=3, shad_learning_rate=1e-2)
    found = policy.remember(table, ctx)[NAME]
    trained = np.asarray(table.loss_weight) > 0
    trained[table.offsets[:-1]] = False
    assert (np.isnan(found) == ~trained).all()  # each response token is in one class
    assert 0 < (found[trained] > 0).sum() < trained.sum()
    assert "6 shuffled rows" in ctx.report.warnings[0]


def test_only_rows_with_a_prompt_are_dealt(table):
    """Not one that is trained from its second token on, not a piece that goes on with the row before."""
    ids, ones = np.arange(30, 36, dtype=np.int32), np.ones(6, np.float32)
    more = [Sequence(ids, ones, 7), Sequence(ids, np.r_[0, ones[1:]], 8), Sequence(ids, np.r_[0, 0, ones[2:]], 8)]
    more += [Sequence(ids[:2], np.zeros(2, np.float32), 9), Sequence(ids, np.r_[0, 0, ones[2:]], 10)]
    mixed = TokenTable.from_sequences([*(table.sequence(row) for row in range(12)), *more])
    assert with_prompts(mixed).record.tolist() == [*range(100, 112), 10]


def test_rows_without_a_prompt_are_refused():
    plain = TokenTable.from_sequences([Sequence(np.arange(5, dtype=np.int32), np.ones(5, np.float32), 0)])
    with pytest.raises(DataError, match="no row has a prompt"):
        with_prompts(plain)


def test_one_row_cannot_be_shuffled(table, context):
    with pytest.raises(DataError, match="2 rows"):
        RftShad().remember(table.rows(np.array([0])), context("rft_shad"))


@pytest.mark.parametrize("knobs", [{"tau": 0}, {"shuffled_rows": 0}, {"shuffled_rows": 2}, {"shad_epochs": 0}])
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        RftShad(**knobs)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny_dir, rows_file, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        words = ["recipe=rft_shad", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={tmp_path / out}"]
        words += ["eval=[]", "data.heldout=0", "train.batch_size=8", "train.max_steps=3", "tokens.shuffled_rows=0.5"]
        words += ["tokens.shad_learning_rate=1e-2", "launch.threads=1", f"launch.processes={processes}"]
        ftrun.run("train", overrides=words)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-4)
