"""The second stage: load the model and put on it what trains."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from ftrun import registry
from ftrun.adapters.base import Adapter
from ftrun.adapters.plain_weights import load_again
from ftrun.config.ancestor import adapter_of
from ftrun.data.render import apply_template
from ftrun.data.tokens import TokenTable
from ftrun.errors import ConfigError
from ftrun.models.bundle import Bundle
from ftrun.models.load import load_bundle, load_config, parameters_in, resolve_dtype
from ftrun.models.precision import NARROW, mix
from ftrun.objectives.base import Objective
from ftrun.runs import memory
from ftrun.runs.artifacts import digest, sha256
from ftrun.select.order import training_order
from ftrun.tokens.base import TokenPolicy
from ftrun.training import estimate
from ftrun.training.context import Context
from ftrun.training.loop import Reference, Trainer, switched_off
from ftrun.training.setup import set_up


def load_model(ctx: Context, labels: int | None, whole: bool = True) -> None:
    """Put the run's model into ``ctx.bundle``; ``labels``: classes of a classifier. Raises ResourceError.

    Where the run holds a slice of the model in each process, it is loaded in slices unless a ``whole`` one is wanted.
    """
    strategy = ctx.strategy
    if strategy is None or not strategy.sharded:
        _load(ctx, labels)
        return
    if whole:
        ctx.report.warn(
            "the selection works with a whole copy of the model in each process; slices are for what trains and evaluates"
        )
    with ctx.team.in_turns():
        _load(ctx, labels)
        assert ctx.bundle is not None
        if not whole:
            strategy.place({"model": ctx.bundle.model}, ctx.bundle.architecture.layers)
    if not whole:
        strategy.open()


def _load(ctx: Context, labels: int | None) -> None:
    settings = ctx.settings
    _warn_of_large_weights(ctx)
    with (
        ctx.report.task("loading the model", None),
        memory.memory_guard("loading the model", "Use quant=nf4, or a smaller model."),
    ):
        bundle = load_bundle(
            settings.model,
            task=settings.task,
            quant=settings.component("quant"),
            device=ctx.team.device,
            labels=labels,
        )
    if settings.task == "causal":
        apply_template(bundle.tokenizer, settings.model.template)
    ctx.bundle = bundle
    ctx.facts["model"] = bundle.fingerprint
    ctx.facts["template"] = digest(getattr(bundle.tokenizer, "chat_template", None))
    if settings.run:
        _go_on(bundle, ctx)


def _go_on(bundle: Bundle, ctx: Context) -> None:
    """Put the adapter of the run that this one goes on from on its base, and note down whose weights these are."""
    settings, run = ctx.settings, adapter_of(ctx.settings)
    source = run / "adapter" if run else Path(settings.model.path)
    weights = sorted(source.glob("*.safetensors"))
    ctx.facts["ancestor"] = {"run": settings.run, "weights": digest([sha256(file) for file in weights])}
    if run is None:
        if bundle.dtype in NARROW and "trainable_base" in registry.find("adapter", settings.choice("adapter")).needs:
            bundle.model = load_again(bundle.model, source).eval()  # what was trained in float32 is not rounded
            mix(bundle)
        return
    lock = run / "lock.json"
    stood_on = json.loads(lock.read_text())["fingerprints"].get("model") if lock.exists() else None
    if stood_on and stood_on != bundle.fingerprint:
        raise ConfigError(
            f"{settings.model.path} is not the base that {run} was trained on: its weights or its tokenizer have changed",
            f"run={run}",
            "Give the adapter back its base.",
        )
    adapter: Adapter = settings.component("adapter")
    ctx.adapter = adapter
    bundle.model = adapter.go_on(settings.component("quant").prepare(bundle.model), ctx, run)
    bundle.model.eval()
    mix(bundle)


def attach(
    table: TokenTable,
    ctx: Context,
    objective: Objective,
    tokens: TokenPolicy,
    evaluate: Callable[[], float] | None,
    selected: bool,
    labels: int | None = None,
) -> Trainer:
    """What trains the loaded model on ``table``; the adapter is on it afterwards.

    ``evaluate`` gives the held-out loss; ``selected``: a selection may say in which order the rows come; ``labels``:
    classes of a classifier. With a slice of the model in each process, one process of a machine after the other loads it
    anew, puts the adapter on and keeps its slice: a machine never holds more than one whole copy.
    """
    if selected:
        ctx.begin = training_order(table, ctx)
    if ctx.strategy is None or not ctx.strategy.sharded:
        return _attach(table, ctx, objective, tokens, evaluate)
    ctx.bundle = ctx.adapter = None
    ctx.strategy.release()
    with ctx.team.in_turns():
        _load(ctx, labels)
        return _attach(table, ctx, objective, tokens, evaluate)


def _attach(
    table: TokenTable, ctx: Context, objective: Objective, tokens: TokenPolicy, evaluate: Callable[[], float] | None
) -> Trainer:
    settings, bundle = ctx.settings, ctx.bundle
    assert bundle is not None
    begun = ctx.adapter
    adapter: Adapter = begun if isinstance(begun, Adapter) else settings.component("adapter")
    original = _copy_for_reference(adapter, objective, bundle.model, ctx)
    torch.manual_seed(settings.seed)
    if not begun:
        bundle.model = settings.component("quant").prepare(bundle.model)
    return set_up(
        ctx,
        bundle,
        table,
        adapter=adapter,
        objective=objective,
        tokens=tokens,
        optim=settings.component("optim"),
        schedule=settings.component("schedule"),
        evaluate=evaluate,
        reference=_reference(adapter, original, ctx) if objective.uses_reference else None,
        original=original,
        strategy=ctx.strategy,
    )


def free_memory(ctx: Context) -> float:
    """Bytes that this process may take: the processes of a machine without GPUs share its memory."""
    device = ctx.team.device
    return memory.available_bytes(device) / (ctx.settings.launch.processes if device.type == "cpu" else 1)


def _warn_of_large_weights(ctx: Context) -> None:
    settings = ctx.settings
    config = load_config(settings.model).get_text_config()
    dtype = resolve_dtype(settings.model.dtype, ctx.team.device)
    tables = config.vocab_size * config.hidden_size * (1 if getattr(config, "tie_word_embeddings", True) else 2)
    need = estimate.weight_bytes(settings, parameters_in(settings.model), tables, dtype)
    if short := estimate.shortage(need, free_memory(ctx)):
        ctx.report.warn(f"the weights may not fit: {short}")


def _copy_for_reference(adapter: Adapter, objective: Objective, model: nn.Module, ctx: Context) -> nn.Module | None:
    """A frozen copy of the untrained model, where an objective needs it and the adapter cannot be switched off."""
    if not objective.uses_reference or type(adapter).disabled is not Adapter.disabled:
        return None
    ctx.report.note("the reference model is a frozen copy: this adapter cannot be switched off")
    return copy.deepcopy(model).eval().requires_grad_(False)


def _reference(adapter: Adapter, original: nn.Module | None, ctx: Context) -> Reference:
    if original is None:
        return lambda: switched_off(adapter, ctx.bundle.model)  # type: ignore[union-attr]

    @contextlib.contextmanager
    def frozen() -> Iterator[nn.Module]:
        yield original

    return frozen
