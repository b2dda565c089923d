"""Full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.adapters.base import Adapter
from ftrun.models.quiet import without_bars
from ftrun.registry import register

if TYPE_CHECKING:
    from torch import nn

    from ftrun.runs.context import Context


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


def save_model(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write ``folder``/model in the transformers format, with the tokenizer where there is one."""
    target = folder / "model"
    with without_bars():
        model.save_pretrained(target)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    return target


def load_again(model: Any, folder: Path) -> Any:
    """The weights in ``folder``, loaded with the class, dtype, attention, quantisation and device of ``model``."""
    config = model.config
    arguments: dict[str, Any] = {"dtype": model.dtype, "attn_implementation": config._attn_implementation}
    if getattr(config, "quantization_config", None) is not None:
        arguments["quantization_config"] = config.quantization_config
    with without_bars():
        return type(model).from_pretrained(folder, **arguments).to(model.device)
