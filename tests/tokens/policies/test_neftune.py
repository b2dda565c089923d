"""NEFTune: the size of the noise, where it falls, and what it does not depend on."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import ftrun
from ftrun.data.batches import Batch, micro_batches
from ftrun.errors import ConfigError
from ftrun.tokens.policies.neftune import Neftune
from ftrun.training.view import StepView


def noise(policy: Neftune, batch: Batch, step: int = 0, width: int = 32) -> torch.Tensor:
    shape = (*batch.input_ids.shape, width)
    return policy.perturb(torch.zeros(shape), batch, (0, step))


def by_row(batch: Batch, values: torch.Tensor) -> dict[int, torch.Tensor]:
    return {row: values[batch.sequence == number] for number, row in enumerate(batch.table_index.tolist())}


@pytest.fixture
def batches(bundle, table):
    def make(batch_tokens: int = 60, packing: bool = False) -> list[Batch]:
        return list(micro_batches(table, np.arange(len(table)), batch_tokens, packing, bundle.pad_id))

    return make


def test_bounds_and_norm(batches, table):
    """Every number lies within alpha / sqrt(L d), spreads over it evenly, and the norm is alpha / sqrt(3) on average."""
    norms = []
    for batch in batches():
        for row, drawn in by_row(batch, noise(Neftune(alpha=5), batch)).items():
            length, width = drawn.shape
            assert length == table.lengths[row]
            bound = 5 / math.sqrt(length * width)
            assert drawn.abs().max() <= bound and drawn.norm() <= 5
            assert drawn.abs().max() > 0.9 * bound and drawn.mean().abs() < 0.2 * bound
            norms.append(float(drawn.norm()))
    assert np.mean(norms) == pytest.approx(5 / math.sqrt(3), rel=0.05)


def test_padding_gets_none(batches):
    padded = next(batch for batch in batches() if (batch.sequence < 0).any())
    assert not noise(Neftune(), padded)[padded.sequence < 0].any()


def test_packing_and_the_cut_do_not_matter(batches):
    whole: dict[int, torch.Tensor] = {}
    for batch in batches(10_000):
        whole |= by_row(batch, noise(Neftune(), batch))
    for packing, tokens in ((True, 60), (False, 1), (True, 10_000)):
        for batch in batches(tokens, packing):
            for row, drawn in by_row(batch, noise(Neftune(), batch)).items():
                assert torch.equal(drawn, whole[row])


def test_every_step_and_row_draws_anew(batches):
    batch = batches()[0]
    first, later = noise(Neftune(), batch, 0), noise(Neftune(), batch, 1)
    assert not torch.equal(first, later)
    assert torch.equal(first, noise(Neftune(), batch, 0))
    rows = list(by_row(batch, first).values())
    assert not torch.equal(rows[0][: len(rows[1])] * math.sqrt(len(rows[0])), rows[1] * math.sqrt(len(rows[1])))


def test_the_view_adds_it_to_the_embeddings_and_nowhere_else(bundle, batches):
    """The same states as from the model's own forward on noisy embeddings; afterwards the model is as before."""
    policy, batch = Neftune(alpha=5), batches()[0]
    view = StepView(
        bundle.model, bundle.architecture, batch, perturb=lambda given, of: policy.perturb(given, of, (0, 3))
    )
    embedded = bundle.model.get_input_embeddings()(batch.input_ids)
    noisy = bundle.model.model(inputs_embeds=embedded + noise(policy, batch, 3)).last_hidden_state[batch.predicting]
    torch.testing.assert_close(view.hidden, noisy, rtol=1e-5, atol=1e-5)
    plain = StepView(bundle.model, bundle.architecture, batch)
    assert not torch.allclose(plain.hidden, view.hidden, atol=1e-3)
    torch.testing.assert_close(bundle.model.get_input_embeddings()(batch.input_ids), embedded)


def test_the_first_packed_batch_may_be_noisy(bundle, batches):
    """Whether the model keeps documents apart is tried on first use, and noise must not decide it."""
    bundle.architecture.packing.clear()
    (batch,) = batches(10_000, packing=True)
    perturb = functools.partial(Neftune().perturb, seed=(0, 0))
    view = StepView(bundle.model, bundle.architecture, batch, perturb=perturb)
    assert batch.packed and torch.isfinite(view.hidden).all()


@pytest.mark.parametrize("alpha", [-1.0, math.inf])
def test_alpha_is_a_size(alpha):
    with pytest.raises(ConfigError, match="must not be negative"):
        Neftune(alpha=alpha)


def words(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[str]:
    quick = ["data.heldout=0.2", "data.max_length=256", "train.batch_size=4", "train.max_steps=4"]
    return ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *quick, *more]


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_alpha_0_is_plain_training(tiny_dir, rows_file, tmp_path):
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "sft"))
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "zero", "tokens=neftune", "tokens.alpha=0"))
    assert losses(tmp_path / "sft") == losses(tmp_path / "zero")


def test_noise_falls_on_training_only(tiny_dir, rows_file, tmp_path):
    """With nothing learned the held-out loss stays what it was, while training losses are those of noisy rows."""
    still = ("optim.learning_rate=0", "optim.weight_decay=0")
    plain = ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "sft", *still))
    noisy = ftrun.run(
        "train", overrides=words(tiny_dir, rows_file, tmp_path / "neft", *still, "tokens=neftune", "tokens.alpha=50")
    )
    assert noisy["metrics"]["heldout"] == plain["metrics"]["heldout"]
    assert all(
        abs(one - two) > 1e-4 for one, two in zip(losses(tmp_path / "sft"), losses(tmp_path / "neft"), strict=True)
    )


@pytest.mark.parametrize("more", [["train.packing=true"], ["train.batch_tokens=1"]])
def test_a_run_does_not_depend_on_the_cut(more, tiny_dir, rows_file, tmp_path):
    neft = ("recipe=neftune", "train.packing=false")
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "a", *neft[1:], "tokens=neftune"))
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "b", *more, "tokens=neftune"))
    np.testing.assert_allclose(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-5, atol=1e-5)


def test_adapters_train_under_noise(tiny_dir, rows_file, tmp_path):
    """The hook finds the embedding below an adapter, with checkpointed activations too."""
    more = ["tokens=neftune", "tokens.alpha=20", "adapter=lora", "train.gradient_checkpointing=true"]
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "lora", *more))
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "plain", *more[2:]))
    assert losses(tmp_path / "lora")[0] != pytest.approx(losses(tmp_path / "plain")[0], abs=1e-4)
