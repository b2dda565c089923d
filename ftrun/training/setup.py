"""A trainer from its parts: the adapter is attached, the optimiser sees what it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ftrun.data.tokens import TokenTable
from ftrun.errors import ConfigError
from ftrun.models.bundle import Bundle
from ftrun.models.checkpointing import checkpoint_activations
from ftrun.models.fast import packs_for_free, speed_up
from ftrun.optim.base import OptimizerConfig
from ftrun.schedules.base import Schedule
from ftrun.training.context import Context
from ftrun.training.loop import Reference, Trainer
from ftrun.training.parts import Attached, Minimised, Weighing
from ftrun.training.precision import settle_precision
from ftrun.training.strategies.base import Strategy
from ftrun.training.strategies.ddp import Ddp


def set_up(
    ctx: Context,
    bundle: Bundle,
    table: TokenTable,
    *,
    adapter: Attached,
    objective: Minimised,
    tokens: Weighing,
    optim: OptimizerConfig,
    schedule: Schedule,
    evaluate: Callable[[], float] | None = None,
    reference: Reference | None = None,
    original: nn.Module | None = None,
    strategy: Strategy | None = None,
    title: str = "training",
) -> Trainer:
    """Put the adapter on ``bundle.model``, in place, and return what trains it on ``table``.

    ``original``: the frozen copy behind ``reference``, where there is one; ``strategy``: how processes share a step,
    by default with a whole copy in each. Raises ConfigError when no parameter would train.
    """
    strategy = strategy or (Ddp(ctx.team) if ctx.team.world_size > 1 else Strategy(ctx.team))
    parts: dict[str, nn.Module] = {} if original is None else {"original": original}
    if adapter is not ctx.adapter:  # else it came with the model
        bundle.model = adapter.attach(bundle.model, ctx)
    speed_up(bundle.model)  # the layers that the adapter brought
    if ctx.settings.train.gradient_checkpointing:
        checkpoint_activations(bundle.model)
    for owner, part in (("objective", objective), ("tokens", tokens)):
        module = part.attach(bundle, ctx)
        if module is not None:
            parts[owner] = module.to(ctx.team.device)
    if not _trainable({"": bundle.model}):
        raise ConfigError(
            "nothing would be trained: no parameter is trainable",
            f"adapter={adapter.name}",  # type: ignore[attr-defined]
            "Choose an adapter, or quant=none for full fine-tuning.",
        )
    settle_precision(bundle, _trainable({"": bundle.model, **parts}), ctx.settings.train.pure_bfloat16, ctx.report)
    layers = list(bundle.architecture.layers)
    if original is not None:
        layers += bundle.architecture.layers_of(original)
    if strategy.sharded:
        packs_for_free(bundle.model, bundle.architecture)  # tried while the weights are whole, and remembered
    strategy.place({"model": bundle.model, **parts}, layers)
    named = _trainable({"": bundle.model, **parts})  # a strategy may have put slices in their place
    optimizer = optim.build(list(named.items()))
    adapter.bind(optimizer)
    adapter.before_step(0)  # some train only a part at a time
    return Trainer(
        ctx=ctx,
        bundle=bundle,
        table=table,
        adapter=adapter,
        objective=objective,
        tokens=tokens,
        optimizer=optimizer,
        schedule=schedule,
        parameters=named,
        strategy=strategy,
        evaluate=evaluate,
        reference=reference,
        title=title,
    )


def _trainable(parts: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Everything that may train, by name; a part's name stands before those of its parameters."""
    return {
        f"{owner}.{name}" if owner else name: parameter
        for owner, part in parts.items()
        if owner != "original"
        for name, parameter in part.named_parameters()
        if parameter.requires_grad
    }
