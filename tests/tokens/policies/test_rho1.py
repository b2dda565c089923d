"""Rho-1 against plain numpy, what it remembers, and what a step may not depend on."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import ftrun
from ftrun.data.batches import micro_batches
from ftrun.errors import ConfigError
from ftrun.objectives.sft import Sft
from ftrun.tokens.policies.rho1 import Rho1
from ftrun.tokens.run import run_tokens
from ftrun.training.view import StepView


@pytest.fixture
def reference(bundle):
    """The run's model with its weights moved a little."""
    model = copy.deepcopy(bundle.model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def reference_dir(reference, bundle, tmp_path):
    reference.save_pretrained(tmp_path / "reference")
    bundle.tokenizer.save_pretrained(tmp_path / "reference")
    return tmp_path / "reference"


def losses_of(model, table) -> np.ndarray:
    """Loss of every trained token of the table at batch size 1, NaN elsewhere."""
    result = np.full(len(table.input_ids), np.nan)
    for index in range(len(table)):
        item, start = table.sequence(index), table.offsets[index]
        ids = torch.tensor(item.input_ids.tolist())
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].double().numpy()
        total = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        nll = total - logits[range(len(ids) - 1), ids[1:].numpy()]
        result[start + 1 : start + len(ids)] = np.where(item.loss_weight[1:] > 0, nll, np.nan)
    return result


@pytest.fixture
def remembered(reference, table):
    return table.with_remembered({"reference_nll": losses_of(reference, table)})


@pytest.fixture
def excess(bundle, table, remembered) -> list[np.ndarray]:
    """Excess losses of the trained tokens of every row."""
    flat = losses_of(bundle.model, table) - remembered.remembered["reference_nll"]
    rows = np.split(flat, table.offsets[1:-1])
    return [row[~np.isnan(row)] for row in rows]


@pytest.fixture
def views(bundle, remembered):
    def make(batch_tokens: int = 60, packing: bool = False, order=None) -> list[StepView]:
        drawn = np.arange(len(remembered)) if order is None else np.array(order)
        batches = micro_batches(remembered, drawn, batch_tokens, packing, bundle.pad_id)
        return [StepView(bundle.model, bundle.architecture, batch) for batch in batches]

    return make


def step(policy: Rho1, views: list[StepView]) -> dict[int, np.ndarray]:
    """Factors of the trained tokens of every row, as the loop gets them."""
    everything = torch.cat([policy.statistic(view) for view in views])
    assert not everything.requires_grad
    factors = {}
    for view in views:
        view.step_statistics = everything
        weighed = policy.weigh(view)
        assert not weighed.requires_grad and weighed.dtype == view.token_nll.dtype
        for number, row in enumerate(view.batch.table_index.tolist()):
            factors[row] = weighed[view.batch.target_sequence == number].numpy()
    return factors


def expected(excess: list[np.ndarray], k: float, scope: str) -> np.ndarray:
    kept = []
    for group in excess if scope == "sample" else [np.concatenate(excess)]:
        mask = np.zeros(len(group))
        mask[np.argsort(-group, kind="stable")[: math.ceil(k * len(group))]] = 1
        kept.append(mask)
    flat = np.concatenate(kept)
    return flat * len(flat) / flat.sum()


@pytest.mark.parametrize("scope", ["step", "sample"])
@pytest.mark.parametrize("k", [0.05, 0.6, 1.0])
@pytest.mark.parametrize(
    ("batch_tokens", "packing", "turned"),
    [(10_000, False, False), (60, False, True), (1, False, False), (10_000, True, False), (60, True, True)],
)
def test_the_highest_excess_losses_stay(scope, k, batch_tokens, packing, turned, views, excess):
    """However the step is cut, packed or ordered; N / kept for those kept makes the loss their mean."""
    factors = step(Rho1(k=k, scope=scope), views(batch_tokens, packing, range(11, -1, -1) if turned else None))
    found = np.concatenate([factors[row] for row in sorted(factors)])
    np.testing.assert_allclose(found, expected(excess, k, scope), rtol=1e-6)


def test_k_1_is_plain_training(views):
    assert all((values == 1).all() for values in step(Rho1(k=1.0), views()).values())


def test_equal_excess_losses_go_to_the_earlier_tokens(bundle, table, views):
    made = views()
    for view in made:
        view.token_nll = view.batch.remembered_targets("reference_nll").clone()
    factors = step(Rho1(k=0.5), made)
    kept = np.concatenate([factors[row] for row in sorted(factors)]) > 0
    assert kept.tolist() == [n < math.ceil(len(kept) / 2) for n in range(len(kept))]


@pytest.mark.parametrize("scope", ["step", "sample"])
def test_loss_is_the_mean_over_kept_tokens(scope, views):
    made = views()
    policy = Rho1(scope=scope)
    step(policy, made)
    value = count = 0.0
    for view in made:
        view.factors = policy.weigh(view)
        value += float(Sft().loss(view).value.detach())
        count += Sft().count(view.batch)
    kept = torch.cat([view.token_nll.detach()[view.factors > 0] for view in made])
    assert value / count == pytest.approx(float(kept.mean()), rel=1e-5)


def test_a_micro_batch_without_kept_tokens_has_no_loss_and_no_gradient(views, bundle):
    policy, made = Rho1(k=0.02), views(1)
    step(policy, made)
    empty = [view for view in made if not policy.weigh(view).any()]
    assert empty
    for view in empty:
        view.factors = policy.weigh(view)
        loss = Sft().loss(view).value
        assert loss == 0
        loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in bundle.model.parameters())


def test_losses_of_the_reference_are_remembered(reference, reference_dir, table, context):
    ctx = context("rho1", {"reference": str(reference_dir)})
    known = run_tokens(ctx.settings.component("tokens"), table, ctx)
    wanted = losses_of(reference, table)
    np.testing.assert_allclose(known.remembered["reference_nll"], wanted, atol=1e-5)
    np.testing.assert_array_equal(known.loss_weight, table.loss_weight)
    written = pq.read_table(ctx.out / "selection" / "tokens.parquet")
    np.testing.assert_allclose(
        written["reference_nll"].to_numpy(zero_copy_only=False), wanted.astype(np.float32), atol=1e-5
    )
    assert not (ctx.out / "selection" / "token_shards").exists()


def test_the_own_model_as_reference_is_said(tiny_dir, table, context):
    ctx = context()
    Rho1(reference=str(tiny_dir)).remember(table, ctx)
    assert "the run's own model" in ctx.report.warnings[0]


def test_a_reference_is_needed(table, context):
    with pytest.raises(ConfigError, match="needs a reference model"):
        Rho1().remember(table, context())


@pytest.mark.parametrize("k", [0.0, 1.5, -1.0])
def test_k_is_a_share(k):
    with pytest.raises(ConfigError, match="share above 0"):
        Rho1(k=k)


# ---- through the loop ----


def words(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[str]:
    quick = ["eval=[]", "data.heldout=0", "data.max_length=256", "train.batch_size=8", "train.max_steps=3"]
    return ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *quick, *more]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_cut_and_k_1_is_sft(tiny_dir, reference_dir, rows_file, tmp_path):
    rho = ("tokens=rho1", f"tokens.reference={reference_dir}")
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "a", *rho, "train.packing=false"))
    for cut in ("train.batch_tokens=1", "train.packing=true"):
        out = tmp_path / cut
        ftrun.run("train", overrides=words(tiny_dir, rows_file, out, *rho, cut))
        np.testing.assert_allclose(losses(out), losses(tmp_path / "a"), rtol=1e-5, atol=1e-5)
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "one", *rho, "tokens.k=1"))
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "sft"))
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "sft"), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["step", "sample"])
def test_two_processes_train_what_one_trains(scope, tiny_dir, reference_dir, rows_file, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        more = ("tokens=rho1", f"tokens.reference={reference_dir}", f"tokens.scope={scope}", "launch.threads=1")
        overrides = words(tiny_dir, rows_file, tmp_path / out, *more, f"launch.processes={processes}")
        ftrun.run("train", overrides=overrides)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5, atol=1e-5)
