"""The horizon's error against plain numpy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ftrun
from ftrun.config.compose import load
from ftrun.config.settings import ModelConfig
from ftrun.data.batches import micro_batches
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError
from ftrun.models.bundle import Bundle
from ftrun.models.load import load_bundle
from ftrun.objectives.horizon_length import HorizonLength
from ftrun.objectives.text import Text
from ftrun.training.view import StepView


@pytest.fixture
def bundle(tiny_dir: Path) -> Bundle:
    return load_bundle(ModelConfig(path=str(tiny_dir)), task="causal")


@pytest.fixture
def table() -> TokenTable:
    """Eight texts; the odd ones have a middle of 1 to 5 tokens at their end."""
    random = np.random.default_rng(1)
    made, horizon = [], []
    for number in range(8):
        length = int(random.integers(6, 20))
        weight = np.ones(length, np.float32)
        weight[0] = 0
        made.append(Sequence(random.integers(10, 300, length).astype(np.int32), weight, number))
        m = number // 2 + 1 if number % 2 else 0
        horizon += [np.nan] * (length - m) + [(m - t) / m for t in range(1, m + 1)]
    return TokenTable.from_sequences(made).with_remembered({"horizon": np.array(horizon)})


def attached(bundle: Bundle, **knobs: Any) -> HorizonLength:
    objective = HorizonLength(**knobs)
    ctx: Any = SimpleNamespace(seed=0)
    objective.attach(bundle, ctx)
    return objective


def losses(objective, bundle, table, batch_tokens=10_000, packing=False) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean loss of one step over all rows, and its parts, as the loop makes them."""
    batches = list(micro_batches(table, np.arange(len(table)), batch_tokens, packing, bundle.pad_id))
    counts: dict[str, float] = {"loss": sum(objective.count(batch) for batch in batches)}
    for batch in batches:
        for name, value in objective.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + value
    found = [objective.loss(StepView(bundle.model, bundle.architecture, batch, counts=counts)) for batch in batches]
    parts = {name: sum(float(loss.parts[name].detach()) for loss in found) / counts["loss"] for name in found[0].parts}
    return torch.stack([loss.value for loss in found]).sum() / counts["loss"], parts


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_loss_follows_the_formula(activation, bundle, table):
    objective = attached(bundle, weight=0.3, head_activation=activation)
    weight, bias = (p.detach().double().numpy() for p in objective.head.parameters())
    nll, errors = [], []
    for row in range(len(table)):
        start, end = table.offsets[row], table.offsets[row + 1]
        ids = torch.tensor(table.input_ids[start:end].tolist())
        with torch.no_grad():
            states = bundle.model.model(ids[None]).last_hidden_state[0].double().numpy()
            logits = bundle.model(ids[None]).logits[0].double()
        nll += (-torch.log_softmax(logits[:-1], -1)[range(len(ids) - 1), ids[1:]]).tolist()
        for t, y in enumerate(table.remembered["horizon"][start:end]):
            if not np.isnan(y):
                guess = float(states[t] @ weight[0] + bias[0])
                errors.append(abs((1 / (1 + np.exp(-guess)) if activation == "sigmoid" else guess) - y))
    loss, parts = losses(objective, bundle, table)
    assert len(errors) == 1 + 2 + 3 + 4
    assert parts["hlp"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert parts["ntp"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert float(loss.detach()) == pytest.approx(np.mean(nll) + 0.3 * np.mean(errors), rel=1e-5)


@pytest.mark.parametrize("way", [{"batch_tokens": 1}, {"batch_tokens": 40}, {"packing": True}])
def test_the_cut_does_not_matter(way, bundle, table):
    objective = attached(bundle)
    whole, cut = losses(objective, bundle, table), losses(objective, bundle, table, **way)
    assert cut[1] == pytest.approx(whole[1], rel=1e-5)


def test_weight_zero_is_plain_training(bundle, table):
    with_head, _ = losses(attached(bundle, weight=0.0), bundle, table)
    plain = sum(
        float(Text().loss(StepView(bundle.model, bundle.architecture, batch)).value.detach())
        for batch in micro_batches(table, np.arange(len(table)), 10_000, False, bundle.pad_id)
    )
    assert float(with_head.detach()) == pytest.approx(plain / table.trained_counts().sum(), rel=1e-6)


def test_without_a_middle_there_is_no_error(bundle, table):
    plain = replace(table, remembered={"horizon": np.full(len(table.input_ids), np.nan, np.float32)})
    loss, parts = losses(attached(bundle), bundle, plain)
    assert parts["hlp"] == 0 and torch.isfinite(loss)
    loss.backward()


def test_the_head_is_one_linear_map_in_float32_and_learns(bundle, table):
    objective = attached(bundle)
    assert sum(p.numel() for p in objective.head.parameters()) == bundle.architecture.width + 1
    assert all(p.dtype == torch.float32 for p in objective.head.parameters())
    bundle.model.requires_grad_(True)
    loss, _ = losses(objective, bundle, table)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.head.parameters())


def test_the_saved_model_has_no_head(tiny_dir, tmp_path):
    """The head trains, lies in the checkpoint, and is not exported."""
    file, out = tmp_path / "code.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps({"text": f"the quick brown fox jumps {n}"}) + "\n" for n in range(8)))
    words = ["recipe=horizon_length_prediction", f"model.path={tiny_dir}", f"data.path={file}", f"out={out}"]
    ftrun.run("train", overrides=[*words, "train.max_steps=2", "train.batch_size=4", "data.heldout=0", "eval=[]"])
    saved = load_file(out / "train/checkpoints/step-000002/trainable.safetensors")
    assert {name: tuple(saved[name].shape) for name in saved if name.startswith("objective.")} == {
        "objective.weight": (1, 32),
        "objective.bias": (1,),
    }
    assert load_file(out / "model/model.safetensors").keys() == load_file(tiny_dir / "model.safetensors").keys()


def test_it_needs_middles():
    with pytest.raises(ConfigError, match="only tokens=fill_in_the_middle"):
        HorizonLength().check(load(["recipe=horizon_length_prediction", "tokens=none"]).settings)
