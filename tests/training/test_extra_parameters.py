"""Parameters and counts that objectives and token policies bring: trained, saved to resume from, never exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ftrun
from ftrun.tokens.policies.neftune import Neftune

QUICK = ["eval=[]", "data.heldout=0", "data.max_length=256", "train.batch_size=4", "train.max_steps=6"]
ADAPTERS = {"full": ["adapter=none"], "lora": ["adapter=lora", "adapter.r=4", "optim.learning_rate=1e-3"]}
HEAD = {"objective.weight", "objective.bias"}


def words(variant: str, tiny_dir: Path, text_file: Path, out: Path, *more: str) -> list[str]:
    start = ["recipe=horizon_length_prediction", f"model.path={tiny_dir}", f"data.path={text_file}", f"out={out}"]
    return [*start, *ADAPTERS[variant], *QUICK, *more]


def train(*overrides: str) -> dict:
    return ftrun.run("train", overrides=list(overrides))


def checkpoint(out: Path, step: int) -> dict[str, np.ndarray]:
    found = load_file(out / f"train/checkpoints/step-{step:06d}/trainable.safetensors")
    return {name: tensor.numpy().copy() for name, tensor in found.items()}


def column(out: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if "loss" in line]


def exported(out: Path) -> set[str]:
    files = [*out.glob("model/*.safetensors"), *out.glob("adapter/*.safetensors")]
    assert files
    return {name for file in files for name in load_file(file)}


@pytest.mark.parametrize("variant", list(ADAPTERS))
def test_they_train_lie_in_checkpoints_and_are_not_exported(variant, tiny_dir, text_file, tmp_path):
    summary = train(*words(variant, tiny_dir, text_file, tmp_path / "run", "train.save_steps=1", "train.max_steps=2"))
    first, second = checkpoint(tmp_path / "run", 1), checkpoint(tmp_path / "run", 2)
    assert first.keys() >= HEAD
    assert all((first[name] != second[name]).any() for name in HEAD)
    assert summary["trainable_parameters"] == sum(values.size for values in second.values())
    plain = tmp_path / "plain"
    text = [word for word in words(variant, tiny_dir, text_file, plain) if not word.startswith("recipe=")]
    train("recipe=cpt", *text)
    assert exported(tmp_path / "run") == exported(plain)


class Killed(BaseException):
    """Stands for SIGKILL inside the process: nothing catches it."""


@pytest.mark.parametrize("variant", list(ADAPTERS))
def test_resume_equals_uninterrupted_to_the_bit(variant, tiny_dir, text_file, tmp_path, monkeypatch):
    from ftrun.training import loop

    whole, cut = (
        words(variant, tiny_dir, text_file, tmp_path / name, "train.save_steps=2") for name in ("whole", "cut")
    )
    train(*whole)
    plain, steps = loop.Trainer._clip, []

    def dies(self):
        steps.append(1)
        if len(steps) == 4:
            raise Killed
        return plain(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Trainer, "_clip", dies)
        train(*cut)
    train(*[word for word in cut if not word.startswith("out=")], f"resume={tmp_path / 'cut'}")
    one, two = checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "cut", 6)
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert column(tmp_path / "whole", "loss") == column(tmp_path / "cut", "loss")


@pytest.mark.slow
def test_the_cut_does_not_matter_for_a_second_mean(tiny_dir, text_file, tmp_path):
    train(*words("full", tiny_dir, text_file, tmp_path / "whole", "train.packing=false"))
    for cut in ("train.batch_tokens=1", "train.batch_tokens=100", "train.packing=true"):
        train(*words("full", tiny_dir, text_file, tmp_path / cut, cut))
        for name in ("loss", "ntp", "hlp"):
            one, two = column(tmp_path / "whole", name), column(tmp_path / cut, name)
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6, err_msg=f"{cut} {name}")


@pytest.mark.slow
def test_two_processes_same_losses(tiny_dir, text_file, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        overrides = words("full", tiny_dir, text_file, tmp_path / name, f"launch.processes={processes}")
        train(*overrides, "launch.threads=1")
    for name in ("loss", "ntp", "hlp"):
        one, two = column(tmp_path / "one", name), column(tmp_path / "two", name)
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    one, two = checkpoint(tmp_path / "one", 6), checkpoint(tmp_path / "two", 6)
    for name in HEAD:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-6)


def test_a_token_policy_brings_parameters_too(tiny_dir, rows_file, tmp_path, monkeypatch):
    """A vector that is added to all embeddings trains with the model."""

    def attach(self, bundle, ctx):
        self.shift = nn.ParameterDict({"shift": torch.zeros(bundle.architecture.width)})
        return self.shift

    monkeypatch.setattr(Neftune, "attach", attach)
    monkeypatch.setattr(Neftune, "perturb", lambda self, embeddings, batch, seed: embeddings + self.shift["shift"])
    overrides = ["recipe=neftune", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={tmp_path / 'run'}"]
    train(*overrides, *QUICK, "train.max_steps=2")
    assert checkpoint(tmp_path / "run", 2)["tokens.shift"].any()
    assert not any("shift" in name for name in exported(tmp_path / "run"))


def test_counts_are_those_of_the_whole_step(tiny_dir, text_file, tmp_path, monkeypatch):
    """Every micro-batch sees the same sums, those of all micro-batches."""
    from ftrun.objectives.horizon_length import HorizonLength

    seen, own = [], []
    plain = HorizonLength.loss

    def loss(self, view):
        seen.append((view.step, view.steps, dict(view.counts)))
        own.append((view.step, self.count(view.batch), self.counts(view.batch)["horizon"]))
        return plain(self, view)

    monkeypatch.setattr(HorizonLength, "loss", loss)
    more = ["train.batch_tokens=1", "train.packing=false", "train.max_steps=3"]
    train(*words("full", tiny_dir, text_file, tmp_path / "run", *more))
    assert [number for number, _, _ in seen] == sorted([0, 1, 2] * 4)
    for number, steps, counts in seen:
        mine = [(count, horizon) for other, count, horizon in own if other == number]
        assert steps == 3 and counts == {"loss": sum(c for c, _ in mine), "horizon": sum(h for _, h in mine)}
