"""Bottleneck adapters: small residual networks after each feed-forward block."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftrun.adapters.base import Adapter
from ftrun.adapters.peft_adapter import base_of, seeded
from ftrun.errors import ComponentError, ConfigError
from ftrun.models.architecture import Architecture, describe
from ftrun.models.precision import widen
from ftrun.registry import register

if TYPE_CHECKING:
    from ftrun.training.context import Context

ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": nn.functional.relu, "silu": nn.functional.silu}
FILE = "bottleneck.safetensors"


class WithBottleneck(nn.Module):
    """``y + U f(D y)`` of the output ``y`` of a linear layer; U is zero at the start."""

    def __init__(self, linear: nn.Module, width: int, inner: int, activation: str):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width)
        self.activation = ACTIVATIONS[activation]
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + self.up(self.activation(self.down(y.to(self.down.weight.dtype)))).to(y.dtype)


@register("adapter", "bottleneck")
@dataclass
class Bottleneck(Adapter):
    """A bottleneck after each feed-forward block, and the norms (Houlsby et al., 2019, arXiv:1902.00751).

    The output ``y`` of the block becomes ``y + U f(D y)``, D and U of width ``hidden / reduction`` between them; the
    model is unchanged at the start, as U is zero. All other weights are frozen. The result is not a change of the
    weights and cannot be merged; adapter/bottleneck.safetensors holds what was trained, by name.
    """

    reduction: float = 16  # width of the model over that of the bottleneck
    activation: Literal["gelu", "relu", "silu"] = "gelu"  # f
    train_norms: bool = True  # the norms of the layers, and the last one, train too
    train_head: bool = True  # with task=classify: the classifier trains too

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise ConfigError("adapter.reduction is at least 1", f"adapter.reduction={self.reduction:g}")

    def attach(self, model: nn.Module, ctx: Context) -> nn.Module:
        assert ctx.bundle is not None
        classifies = ctx.settings.task == "classify"
        with seeded(ctx.seed):
            return self._put_in(model, ctx.bundle.architecture, self.train_head and classifies)

    def save(self, model: nn.Module, folder: Path) -> Path:
        target = folder / "adapter"
        target.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, target / FILE)
        base, revision = base_of(model)
        about = {"method": "bottleneck", "base_model": base, "revision": revision, **asdict(self)}
        (target / "bottleneck.json").write_text(json.dumps(about, indent=2) + "\n")
        return target

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        saved = load_file(folder / "adapter" / FILE)
        architecture = describe(model)
        head = architecture.head_name if not architecture.causal else None
        model = self._put_in(model, architecture, head is not None and any(n.startswith(head + ".") for n in saved))
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if saved.keys() != parameters.keys():
            odd = sorted(saved.keys() ^ parameters.keys())[:3]
            raise ComponentError(
                "the adapter does not belong to this model", f"{folder / 'adapter' / FILE}: {', '.join(odd)}"
            )
        widen(parameters.values())  # the norms too: they trained in float32
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        return model

    def go_on(self, model: nn.Module, ctx: Context, folder: Path) -> nn.Module:
        return self.load(model, folder)

    def merge(self, model: nn.Module) -> nn.Module:
        raise ComponentError(
            "adapter=bottleneck cannot be merged: it is not a change of the weights",
            todo="Keep adapter/ beside the base model; `ftrun eval` and `ftrun generate` load both.",
        )

    def _put_in(self, model: Any, architecture: Architecture, with_head: bool) -> nn.Module:
        blocks = [linear.name for linear in architecture.linears if linear.kind == "down"]
        if not blocks:
            raise ConfigError(
                f"the feed-forward blocks of a {architecture.family} model are not known",
                "adapter=bottleneck",
                "Use adapter=lora.",
            )
        model.requires_grad_(False)
        width = architecture.width
        for name in blocks:
            parent, _, last = name.rpartition(".")
            linear = model.get_submodule(name)
            device = next(linear.parameters()).device
            inner = max(1, round(width / self.reduction))
            setattr(model.get_submodule(parent), last, WithBottleneck(linear, width, inner, self.activation).to(device))
        named = [*architecture.norms, architecture.final_norm] if self.train_norms else []
        named += [architecture.head_name] if with_head else []
        for name in named:
            if name is not None:
                model.get_submodule(name).requires_grad_(True)
        return model
