"""LISA: a few random decoder layers train at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ftrun.adapters.active_set import ActiveSet
from ftrun.errors import ConfigError
from ftrun.registry import register

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from ftrun.config.settings import Settings
    from ftrun.training.context import Context


@register("adapter", "lisa")
@dataclass
class Lisa(ActiveSet):
    """Layerwise importance sampling (Pan et al., 2024, arXiv:2403.17919).

    Embeddings, head and final norm always train; every ``interval`` optimiser steps ``layers`` decoder layers are
    drawn without replacement and all others sleep. The paper's sampling probabilities are 1 for embeddings and head
    and layers / L for every decoder layer.
    """

    layers: int = 2  # decoder layers that train at a time (gamma)
    interval: int = 20  # optimiser steps between two draws (K)
    state: Literal["drop", "keep", "offload", "reset_all"] = "drop"  # Adam state of sleeping layers; reset_all: of all
    train_embeddings: bool = True  # train embeddings and head; most of the memory of a large vocabulary

    def check(self, settings: Settings) -> None:
        for knob in ("layers", "interval"):
            if getattr(self, knob) < 1:
                raise ConfigError(f"adapter.{knob} must be 1 or more", f"adapter.{knob}={getattr(self, knob)}")

    def attach(self, model: nn.Module, ctx: Context) -> nn.Module:
        super().attach(model, ctx)
        if not self.train_embeddings:
            assert ctx.bundle is not None
            parts = ctx.bundle.architecture
            for name in (*parts.embeddings, parts.head_name):
                if name is not None:
                    model.get_submodule(name).requires_grad_(False)
        return model

    def blocks(self, model: nn.Module, ctx: Context) -> list[list[nn.Parameter]]:
        assert ctx.bundle is not None
        by_layer: dict[int, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            layer = ctx.bundle.architecture.block_of(name)
            if layer is not None:
                by_layer.setdefault(layer, []).append(parameter)
        found = [by_layer[layer] for layer in sorted(by_layer)]
        if self.layers > len(found):
            raise ConfigError(
                f"LISA cannot draw {self.layers} of {len(found)} decoder layers",
                f"adapter.layers={self.layers}",
                f"Use adapter.layers={max(1, len(found) // 2)} or less.",
            )
        return found

    def draw(self, switch: int, blocks: int, generator: np.random.Generator) -> Iterable[int]:
        return generator.choice(blocks, size=self.layers, replace=False).tolist()
