"""A trainer from its parts: the adapter is attached, the optimiser sees what it trains."""

from __future__ import annotations

from collections.abc import Callable

from ftrun.data.tokens import TokenTable
from ftrun.errors import ConfigError
from ftrun.models.bundle import Bundle
from ftrun.models.checkpointing import checkpoint_activations
from ftrun.models.fast import speed_up
from ftrun.optim.base import OptimizerConfig
from ftrun.schedules.base import Schedule
from ftrun.training.context import Context
from ftrun.training.loop import Reference, Trainer
from ftrun.training.parts import Attached, Minimised, Weighing


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
    title: str = "training",
) -> Trainer:
    """Put the adapter on ``bundle.model``, in place, and return what trains it on ``table``.

    Raises ConfigError when no parameter would train.
    """
    if adapter is not ctx.adapter:  # else it came with the model
        bundle.model = adapter.attach(bundle.model, ctx)
    speed_up(bundle.model)  # the layers that the adapter brought
    if ctx.settings.train.gradient_checkpointing:
        checkpoint_activations(bundle.model)
    named = [(name, p) for name, p in bundle.model.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError(
            "nothing would be trained: no parameter is trainable",
            f"adapter={adapter.name}",  # type: ignore[attr-defined]
            "Choose an adapter, or quant=none for full fine-tuning.",
        )
    for owner, part in (("objective", objective), ("tokens", tokens)):
        module = part.attach(bundle, ctx)
        if module is not None:
            module.to(ctx.team.device)
            named += [(f"{owner}.{name}", p) for name, p in module.named_parameters() if p.requires_grad]
    ctx.team.broadcast_([p for _, p in named])
    optimizer = optim.build(named)
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
        parameters=dict(named),
        evaluate=evaluate,
        reference=reference,
        title=title,
    )
