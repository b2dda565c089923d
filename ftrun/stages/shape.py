"""What an adapter trains and whether it fits, from the shape of the model alone."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ftrun import registry
from ftrun.config.settings import Settings
from ftrun.errors import ConfigError
from ftrun.models.architecture import describe
from ftrun.models.bundle import Bundle
from ftrun.models.load import load_tokenizer, meta_model
from ftrun.runs.memory import memory_guard
from ftrun.training.context import Context
from ftrun.training.estimate import Trained

STARTS = {"init_lora_weights": True}  # the others look at weights; the shapes are the same
FEW_WORDS = 16  # of the vocabulary, where layers are counted


def trained(settings: Settings, model: nn.Module, ctx: Context) -> Trained:
    """What trains, by attaching the adapter to ``model`` on the meta device. Raises ConfigError where it does not fit.

    An adapter that looks at weights is put on one and on two layers with random ones: the rest is as many times theirs.
    """
    ctx.bundle = _bundle(settings, model)
    try:
        return _attached(settings, model, ctx, {})
    except NotImplementedError:  # there are no weights to look at
        return _counted(settings, model, ctx)


def check_fit(settings: Settings, ctx: Context) -> None:
    """Refuse an adapter that does not fit the model, before weights are loaded. Raises ConfigError.

    What looks at weights is not tried: that would take as long as the attaching itself.
    """
    before, model = ctx.bundle, meta_model(settings.model, settings.task)
    ctx.bundle = _bundle(settings, model)
    try:
        found = _attached(settings, model, ctx, {})
    except NotImplementedError:
        return
    finally:
        ctx.bundle = before
    if found.ever == 0:
        raise ConfigError(
            "nothing would be trained: no parameter is trainable",
            f"adapter={settings.choice('adapter')}",
            "Give it a larger budget, or other modules.",
        )


def _bundle(settings: Settings, model: nn.Module) -> Bundle:
    architecture, meta = describe(model), torch.device("meta")
    tokenizer, path = load_tokenizer(settings.model), settings.model.path
    return Bundle(model, tokenizer, architecture, meta, torch.float32, path, "", architecture.context_length)


def _attached(settings: Settings, model: nn.Module, ctx: Context, changed: dict[str, Any]) -> Trained:
    name, knobs = settings.slots["adapter"]
    adapter = registry.build("adapter", name, knobs | {k: v for k, v in STARTS.items() if k in knobs} | changed)
    own = {id(parameter) for parameter in model.parameters()}
    attached = adapter.attach(model, ctx)
    candidates = [p for p in attached.parameters() if p.requires_grad]
    if candidates:
        adapter.bind(torch.optim.SGD(candidates, lr=0.0))
    adapter.before_step(0)
    return Trained(
        active=sum(p.numel() for p in attached.parameters() if p.requires_grad),
        ever=sum(p.numel() for p in candidates),
        base=sum(p.numel() for p in candidates if id(p) in own),
    )


def _counted(settings: Settings, model: Any, ctx: Context) -> Trained:
    """From one and from two layers of random weights."""
    bundle = ctx.bundle
    assert bundle is not None
    name, knobs = settings.slots["adapter"]
    asked = knobs.get("layers_to_transform")
    layers = len(bundle.architecture.layers) if asked is None else 1 if isinstance(asked, int) else len(asked)
    changed = {"layers_to_transform": None} if "layers_to_transform" in knobs else {}
    with memory_guard(f"counting what adapter={name} trains", "Use a smaller model."):
        counts = []
        for count in (1, 2):
            small = _with_layers(model, count)
            ctx.bundle = replace(bundle, model=small, architecture=describe(small))
            counts.append(_attached(settings, small, ctx, changed))
    one, two = (asdict(count) for count in counts)
    return Trained(**{part: one[part] + (layers - 1) * (two[part] - one[part]) for part in one})


def _with_layers(model: Any, count: int) -> nn.Module:
    """A model of the same kind with so many layers and random weights; layers do not know of the vocabulary."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size = count, FEW_WORDS
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return type(model)(config)
