"""A whole model saved, and put back: what adapters do that change weights of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftrun.models.quiet import without_bars


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
