"""DFT against its formula, and a run of it against plain training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ftrun
from ftrun.config.compose import load
from ftrun.data.batches import micro_batches
from ftrun.errors import ConfigError
from ftrun.objectives.sft import Sft
from ftrun.tokens.policies.dft import Dft
from ftrun.training.view import StepView


@pytest.fixture
def views(bundle, table):
    def make(batch_tokens: int = 64, packing: bool = False) -> list[StepView]:
        batches = micro_batches(table, np.arange(len(table)), batch_tokens, packing, bundle.pad_id)
        return [StepView(bundle.model, bundle.architecture, batch) for batch in batches]

    return make


def by_row(policy: Dft, views: list[StepView]) -> dict[int, np.ndarray]:
    found = {}
    for view in views:
        weighed = policy.weigh(view)
        assert not weighed.requires_grad
        for number, row in enumerate(view.batch.table_index.tolist()):
            found[row] = weighed[view.batch.target_sequence == number].numpy()
    return found


@pytest.fixture
def probabilities(bundle, table) -> dict[int, np.ndarray]:
    """Probability of the trained tokens of every row, by a loop at batch size 1."""
    found = {}
    for row in range(len(table)):
        item = table.sequence(row)
        ids = torch.tensor(item.input_ids.tolist())
        with torch.no_grad():
            logits = bundle.model(ids[None]).logits[0, :-1].double().numpy()
        exp = np.exp(logits - logits.max(1, keepdims=True))
        gold = (exp / exp.sum(1, keepdims=True))[range(len(ids) - 1), ids[1:].numpy()]
        found[row] = gold[item.loss_weight[1:] > 0]
    return found


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(("batch_tokens", "packing"), [(10_000, False), (1, False), (60, True), (10_000, True)])
def test_weights_are_powers_of_the_probability(power, batch_tokens, packing, views, probabilities):
    found = by_row(Dft(power=power), views(batch_tokens, packing))
    assert set(found) == set(probabilities)
    for row, p in probabilities.items():
        np.testing.assert_allclose(found[row], p**power, rtol=1e-4)


def test_the_gradient_is_that_of_minus_p(views, bundle):
    """sg[p] grad(-log p) = -grad p."""
    (view,) = views(10_000)
    view.factors = Dft().weigh(view)
    Sft().loss(view).value.backward()
    found = [p.grad.clone() for p in bundle.model.parameters()]
    bundle.model.zero_grad()
    (again,) = views(10_000)
    (-(-again.token_nll).exp()).sum().backward()
    for one, two in zip(found, bundle.model.parameters(), strict=True):
        torch.testing.assert_close(one, two.grad, rtol=1e-4, atol=1e-8)


def test_an_impossible_token_teaches_nothing(views):
    (view,) = views(10_000)
    view.token_nll = torch.full_like(view.token_nll, 1e4)
    assert (Dft().weigh(view) == 0).all()


@pytest.mark.parametrize("power", [-1.0, float("inf"), float("nan")])
def test_power_is_a_number_from_0(power):
    with pytest.raises(ConfigError, match="must not be negative"):
        Dft(power=power)


def test_only_token_losses_can_be_weighed():
    with pytest.raises(ConfigError, match="weighs the loss of every token"):
        load(["objective=dpo", "tokens=dft"])


def losses(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[float]:
    quick = ["eval=[]", "data.heldout=0", "data.max_length=256", "train.batch_size=8", "train.max_steps=3"]
    ftrun.run(
        "train",
        overrides=["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *quick, *more],
    )
    return [json.loads(line)["loss"] for line in (out / "train/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_power_0_is_plain_training_and_the_cut_does_not_matter(tiny_dir, rows_file, tmp_path):
    plain = losses(tiny_dir, rows_file, tmp_path / "sft")
    assert losses(tiny_dir, rows_file, tmp_path / "zero", "tokens=dft", "tokens.power=0") == plain
    whole = losses(tiny_dir, rows_file, tmp_path / "whole", "tokens=dft", "train.packing=false")
    cut = losses(tiny_dir, rows_file, tmp_path / "cut", "tokens=dft", "train.batch_tokens=1")
    packed = losses(tiny_dir, rows_file, tmp_path / "packed", "tokens=dft", "train.packing=true")
    np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(packed, whole, rtol=1e-5, atol=1e-7)
