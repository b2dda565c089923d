"""Bottleneck adapters: nothing at the start, then they and the norms alone learn; what is saved loads again."""

from __future__ import annotations

import json

import pytest
import torch

import ftrun
from ftrun.adapters.bottleneck import Bottleneck, WithBottleneck
from ftrun.errors import ComponentError, ConfigError


def test_the_model_is_unchanged_at_the_start(fresh, context, logits):
    model = fresh()
    before = logits(model)
    attached = Bottleneck(reduction=4).attach(model, context(model))
    assert torch.equal(before, logits(attached))


def test_only_bottlenecks_and_norms_learn(fresh, context, train):
    model, adapter = fresh(), Bottleneck(reduction=4)
    model = adapter.attach(model, context(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(adapter, model, count=4)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        learns = "down_proj.down" in name or "down_proj.up" in name or "norm" in name
        assert parameter.requires_grad == learns
        assert (not torch.equal(before[name], parameter)) == learns, name


def test_without_norms_there_are_two_maps_a_layer(fresh, context):
    model = fresh()
    model = Bottleneck(reduction=4, train_norms=False).attach(model, context(model))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 2 * (32 * 8 + 8 + 8 * 32 + 32)


def test_formula():
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 4)
    module = WithBottleneck(linear, 4, 2, "relu")
    torch.nn.init.normal_(module.up.weight)
    x = torch.randn(3, 6)
    y = linear(x)
    by_hand = y + (y @ module.down.weight.T + module.down.bias).clamp(min=0) @ module.up.weight.T
    torch.testing.assert_close(module(x), by_hand)


def test_saved_and_loaded_again(fresh, context, train, logits, tmp_path):
    adapter = Bottleneck(reduction=4)
    model = fresh()
    model = adapter.attach(model, context(model))
    train(adapter, model, count=2)
    folder = adapter.save(model, tmp_path)
    assert json.loads((folder / "bottleneck.json").read_text())["reduction"] == 4
    again = Bottleneck(reduction=4).load(fresh(), tmp_path)
    assert torch.equal(logits(model), logits(again))
    with pytest.raises(ComponentError, match="does not belong"):
        Bottleneck(reduction=4, train_norms=False).load(fresh(), tmp_path)
    with pytest.raises(ComponentError, match="cannot be merged"):
        adapter.merge(model)


def test_a_classifier_trains_with_it(tiny_encoder_dir, labels_file, tmp_path):
    words = ["recipe=classify_lora", "adapter=bottleneck", f"model.path={tiny_encoder_dir}", f"data.path={labels_file}"]
    words += ["train.max_steps=2", "data.heldout=0.3", f"out={tmp_path / 'run'}"]
    summary = ftrun.run("train", overrides=words)
    again = ftrun.run("eval", overrides=[f"run={tmp_path / 'run'}"])
    assert again["metrics"]["classification"] == summary["metrics"]["classification"]


def test_a_wrong_knob_is_refused():
    with pytest.raises(ConfigError):
        Bottleneck(reduction=0.5)
