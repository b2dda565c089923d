"""Auxiliary heads that predict tokens further ahead: copies of a decoder layer over the model's own vocabulary head."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ftrun import registry
from ftrun.adapters.base import Adapter
from ftrun.adapters.peft_adapter import seeded
from ftrun.config.settings import TrainConfig
from ftrun.data.batches import Batch
from ftrun.errors import ConfigError
from ftrun.models.architecture import Architecture
from ftrun.models.head import token_nll
from ftrun.models.precision import products, widen
from ftrun.objectives.base import TokenLoss
from ftrun.runs.stagecache import Key, key_of
from ftrun.tokens.base import TokenPolicy
from ftrun.training import checkpoint
from ftrun.training.loop import Trainer
from ftrun.training.parts import Loss
from ftrun.training.signals import StopSignals
from ftrun.training.strategies.ddp import whole_copies
from ftrun.training.view import StepView

if TYPE_CHECKING:
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

HeadInput = Literal["final", "penultimate"]


@dataclass
class Seen:
    """What the layers of the model were given in the last forward pass."""

    penultimate: Tensor | None = None  # (rows, time, width) input of the last layer
    call: dict[str, Any] = field(default_factory=dict)  # mask, positions and the like, as layer -2 got them


class FutureHeads(nn.Module):
    """``count`` heads. Head i = 1..count at position t predicts token t + 1 + i.

    A head is called with the mask and positions of the layer that it is a copy of, so it sees no future token and no
    other document of a packed row.
    """

    def __init__(self, architecture: Architecture, count: int):
        super().__init__()
        if len(architecture.layers) < 2:
            raise ConfigError("the heads are copies of the layer before the last, and the model has one layer")
        self.layers = nn.ModuleList(plain_copy(architecture.layers[-2]) for _ in range(count))
        widen(self.parameters())

    def counts(self, batch: Batch) -> dict[str, float]:
        """Trained tokens that each head predicts."""
        return {f"head_{i}": float(ahead(batch, i).sum()) for i in range(1, len(self.layers) + 1)}

    def losses(self, view: StepView, states: Tensor, seen: Seen) -> Iterator[Tensor]:
        """CE_i of every head from its input (rows, time, width): sums that divided by ``view.counts["loss"]`` are means.

        Each mean is over the tokens that this head predicts in the whole optimiser step.
        """
        batch, head = view.batch, view.architecture.head(view.model)
        for i, layer in enumerate(self.layers, 1):
            with products(view.model):
                output = layer(states, **seen.call)
            output = output[0] if isinstance(output, tuple) else output
            known, shift = ahead(batch, i), 1 + i
            nll = token_nll(output[:, :-shift][known], head, batch.input_ids[:, shift:][known])
            total = (nll * batch.loss_weight[:, shift:][known]).sum()
            yield total * view.counts["loss"] / max(1.0, view.counts[f"head_{i}"])


def ahead(batch: Batch, i: int) -> Tensor:
    """Where token t + 1 + i is trained and of the same sequence as token t, (rows, time - 1 - i)."""
    shift = 1 + i
    later = batch.sequence[:, shift:]
    return (batch.loss_weight[:, shift:] > 0) & (later == batch.sequence[:, :-shift]) & (later >= 0)


def plain_copy(layer: nn.Module) -> nn.Module:
    """A copy without what peft has put into it; an adapter's change of the weights is kept."""
    found = copy.deepcopy(layer)
    for name, module in list(found.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(found.get_submodule(parent), last, module.get_base_layer())
    return found.requires_grad_(True)


@contextlib.contextmanager
def watched_layers(architecture: Architecture) -> Iterator[Seen]:
    """A context whose ``Seen`` holds what the layers get in the last forward pass in it."""
    seen = Seen()
    before, last = architecture.layers[-2:]

    def keep_call(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.call = {name: value for name, value in kwargs.items() if name != "hidden_states"}

    def keep_input(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.penultimate = args[0] if args else kwargs["hidden_states"]

    hooks = [
        before.register_forward_pre_hook(keep_call, with_kwargs=True),
        last.register_forward_pre_hook(keep_input, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class HeadsAlone(TokenLoss):
    """Trains the heads and nothing else: ``L = sum_i decay^i CE_i`` from the input of the model's last layer."""

    heads: FutureHeads | None = None
    decay: float = 0.8

    def counts(self, batch: Batch) -> dict[str, float]:
        assert self.heads is not None
        return self.heads.counts(batch)

    def loss(self, view: StepView) -> Loss:
        assert self.heads is not None
        with torch.no_grad(), watched_layers(view.architecture) as seen:
            _ = view.states
        assert seen.penultimate is not None
        ce = list(self.heads.losses(view, seen.penultimate, seen))
        value = torch.stack([self.decay**i * part for i, part in enumerate(ce, 1)]).sum()
        return Loss(value, {f"head_{i}": part.detach() for i, part in enumerate(ce, 1)})


@dataclass(frozen=True)
class HeadTraining:
    """How the heads are trained alone."""

    epochs: float
    learning_rate: float  # peak
    batch_size: int
    max_steps: int | None
    decay: float

    def key(self, table: TokenTable, bundle: Bundle, count: int, ctx: Context) -> Key:
        """All that ``count`` trained heads depend on."""
        quant = ctx.settings.slots["quant"]
        what = {
            "training": asdict(self) | {"heads": count},
            "table": table.fingerprint(),
            "model": bundle.computes | {"quant": quant},
            "seed": ctx.seed,
        }
        return key_of("caft_heads", what, modules=[__name__], chosen={"quant": [quant[0]]})

    def run(self, heads: FutureHeads, table: TokenTable, bundle: Bundle, ctx: Context, folder: Path) -> None:
        """Train ``heads`` in place; a run that was killed goes on from the last checkpoint in ``folder``."""
        train = TrainConfig(
            epochs=self.epochs,
            max_steps=self.max_steps,
            batch_size=max(ctx.team.world_size, min(self.batch_size, len(table))),
            batch_tokens=ctx.settings.train.batch_tokens,
            packing=ctx.settings.train.packing,
            save_steps=ctx.settings.train.save_steps,
            keep_checkpoints=1,
        )
        parameters = dict(heads.named_parameters())
        with _frozen(bundle.model), seeded(ctx.seed):
            strategy = whole_copies(ctx.team)
            strategy.place({"heads": heads, "model": bundle.model}, [])
            trainer = Trainer(
                ctx=replace(ctx, settings=replace(ctx.settings, train=train)),
                bundle=bundle,
                table=table,
                adapter=Adapter(),
                objective=HeadsAlone(heads=heads, decay=self.decay),
                tokens=TokenPolicy(),
                optimizer=registry.build("optim", "adamw", {"learning_rate": self.learning_rate}).build(
                    list(parameters.items())
                ),
                schedule=registry.build("schedule", "linear", {"warmup": 0.0}),
                parameters=parameters,
                strategy=strategy,
                evaluate=None,
                title="training the heads",
            )
            trainer.folder = folder
            path, _ = checkpoint.newest_whole(folder / "checkpoints")
            if path is not None:
                trainer.restore(path)
            if trainer.progress.step < trainer.plan.steps:
                trainer.run(StopSignals())
        for parameter in heads.parameters():
            parameter.grad = None


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    for parameter in trains:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trains:
            parameter.requires_grad_(True)
        model.train(training)
