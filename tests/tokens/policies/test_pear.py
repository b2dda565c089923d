"""PEAR against plain loops, and what it remembers and says."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import ftrun
from ftrun.data.batches import micro_batches
from ftrun.errors import ConfigError
from ftrun.tokens.policies.pear import Pear
from ftrun.training.view import StepView


def plain(gain: list[float], policy: Pear) -> list[float]:
    """log G of one response, from log ratios before clipping."""
    d = [min(max(value, policy.ratio_floor), policy.ratio_ceiling) for value in gain]
    T = len(d)
    found = []
    for t in range(T):
        if policy.variant == "sequence":
            log_g = sum(d)
        else:
            size = policy.block if policy.variant == "block" else 1
            end = min(T, (t // size + 1) * size)  # tokens up to and with the block of t
            log_g = (T - end) * math.log(policy.gamma) + sum(d[end:])
        found.append(min(max(log_g, policy.weight_floor), policy.weight_ceiling))
    return found


KNOBS = [
    {},
    {"variant": "block"},
    {"variant": "block", "block": 3, "gamma": 0.9},
    {"variant": "sequence"},
    {"gamma": 0.5, "weight_floor": -3.0},
    {"ratio_floor": -5.0, "ratio_ceiling": 5.0, "weight_ceiling": 0.5},
]


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("seed", range(5))
def test_weights_follow_the_formula(knobs, seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 30, 6)
    gains = [random.normal(0, 0.3, length) for length in lengths]
    sequence = torch.from_numpy(np.repeat([0, 2, 3, 5, 6, 7], lengths))  # two without a trained token
    found = Pear(**knobs).log_weights(torch.from_numpy(np.concatenate(gains)), sequence)
    wanted = np.concatenate([plain(gain.tolist(), Pear(**knobs)) for gain in gains])
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)


def test_blocks_of_one_are_the_token_variant():
    gain, sequence = torch.randn(40, generator=torch.Generator().manual_seed(0)), torch.arange(40) // 13
    one = Pear(variant="block", block=1).log_weights(gain, sequence)
    assert torch.equal(one, Pear().log_weights(gain, sequence))


@pytest.mark.parametrize("variant", ["token", "block", "sequence"])
def test_the_writers_own_tokens_weigh_one_without_discount(variant):
    weights = Pear(variant=variant, gamma=1.0).log_weights(torch.zeros(50), torch.arange(50) // 9).exp()
    assert (weights == 1).all()


def test_the_last_token_weighs_one_and_a_sequence_has_one_weight():
    gain, sequence = torch.randn(30, generator=torch.Generator().manual_seed(0)), torch.arange(30) // 10
    assert Pear().log_weights(gain, sequence)[9::10].tolist() == [0.0, 0.0, 0.0]
    whole = Pear(variant="sequence").log_weights(gain, sequence).view(3, 10)
    assert (whole.max(1).values - whole.min(1).values).max() < 1e-12
    assert len(whole[:, 0].unique()) == 3


def test_only_what_follows_counts():
    """A token's own ratio, and those before it, change nothing."""
    gain, sequence = torch.zeros(10), torch.zeros(10, dtype=torch.long)
    before = Pear().log_weights(gain, sequence)
    gain[6] = -0.05
    after = Pear().log_weights(gain, sequence)
    torch.testing.assert_close(before[6:], after[6:], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[:6], before[:6] - 0.05, rtol=0, atol=1e-8)


def test_no_tokens_no_weights():
    assert len(Pear().log_weights(torch.zeros(0), torch.zeros(0, dtype=torch.long))) == 0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"gamma": 0.0}, "above 0 and is at most 1"),
        ({"gamma": 1.01}, "above 0 and is at most 1"),
        ({"block": 0}, "number of tokens"),
        ({"ratio_floor": 1.0}, "lies above tokens.ratio_ceiling"),
        ({"weight_ceiling": -11.0}, "lies above tokens.weight_ceiling"),
    ],
)
def test_bad_knobs_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        Pear(**knobs)


# ---- with models ----


@pytest.fixture
def writer(bundle):
    """The run's model with its weights moved a little."""
    model = copy.deepcopy(bundle.model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def writer_dir(writer, bundle, tmp_path):
    writer.save_pretrained(tmp_path / "writer")
    bundle.tokenizer.save_pretrained(tmp_path / "writer")
    return tmp_path / "writer"


def log_probabilities(model, table) -> list[np.ndarray]:
    """Of the trained tokens of every row, by a loop at batch size 1."""
    found = []
    for row in range(len(table)):
        item = table.sequence(row)
        ids = torch.tensor(item.input_ids.tolist())
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].double()
        logp = torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]].numpy()
        found.append(logp[item.loss_weight[1:] > 0])
    return found


@pytest.mark.parametrize("knobs", KNOBS[:4])
@pytest.mark.parametrize(("batch_tokens", "packing"), [(10_000, False), (1, False), (60, True)])
def test_a_step_weighs_what_two_models_say(knobs, batch_tokens, packing, bundle, writer, writer_dir, table, context):
    policy = Pear(behaviour=str(writer_dir), **knobs)
    known = table.with_remembered(policy.remember(table, context()))
    pairs = zip(log_probabilities(bundle.model, table), log_probabilities(writer, table), strict=True)
    wanted = [np.exp(plain((ours - theirs).tolist(), policy)) for ours, theirs in pairs]
    for batch in micro_batches(known, np.arange(len(known)), batch_tokens, packing, bundle.pad_id):
        view = StepView(bundle.model, bundle.architecture, batch)
        weights = policy.weigh(view)
        assert not weights.requires_grad and weights.dtype == view.token_nll.dtype
        for number, row in enumerate(batch.table_index.tolist()):
            np.testing.assert_allclose(weights[batch.target_sequence == number].numpy(), wanted[row], rtol=1e-4)


def test_quantiles_are_said_and_silence_is_warned_of(writer_dir, table, context):
    ctx = context()
    Pear(behaviour=str(writer_dir)).remember(table, ctx)
    assert not ctx.report.warnings
    silent = context()
    Pear(behaviour=str(writer_dir), weight_floor=-0.001, ratio_ceiling=-0.08).remember(table, silent)
    assert "of the tokens start at the lowest weight" in silent.report.warnings[0]


def test_errors_name_the_key(table, context, tmp_path):
    with pytest.raises(ConfigError, match="needs the model that wrote"):
        Pear().remember(table, context())
    with pytest.raises(ConfigError, match="holds no model") as error:
        Pear(behaviour=str(tmp_path)).remember(table, context())
    assert error.value.where == f"tokens.behaviour={tmp_path}"


def losses(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[float]:
    quick = ["eval=[]", "data.heldout=0", "data.max_length=256", "train.batch_size=8", "train.max_steps=3"]
    given = ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}"]
    ftrun.run("train", overrides=[*given, *quick, *more])
    return [json.loads(line)["loss"] for line in (out / "train/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_cut_and_starts_as_sft_on_own_data(tiny_dir, rows_file, tmp_path):
    own = ("tokens=pear", f"tokens.behaviour={tiny_dir}", "tokens.gamma=1")
    whole = losses(tiny_dir, rows_file, tmp_path / "a", *own, "train.packing=false")
    assert whole[0] == pytest.approx(losses(tiny_dir, rows_file, tmp_path / "sft")[0], rel=1e-5)
    for cut in ("train.batch_tokens=1", "train.packing=true"):
        found = losses(tiny_dir, rows_file, tmp_path / cut, *own, cut)
        np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
