"""Full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ftrun.adapters.base import Adapter
from ftrun.adapters.plain_weights import load_again, save_model
from ftrun.registry import register

if TYPE_CHECKING:
    from torch import nn

    from ftrun.training.context import Context


@register("adapter", "none")
@dataclass
class FullFineTuning(Adapter):
    """Every weight of the model trains; the result is an ordinary checkpoint."""

    needs: ClassVar[dict[str, str]] = {"trainable_base": "trains all base weights"}

    def attach(self, model: nn.Module, ctx: Context) -> nn.Module:
        self._tokenizer = ctx.bundle.tokenizer if ctx.bundle else None
        return model.requires_grad_(True)

    def save(self, model: nn.Module, folder: Path) -> Path:
        return save_model(model, getattr(self, "_tokenizer", None), folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        return load_again(model, folder / "model")
