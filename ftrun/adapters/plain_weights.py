"""A whole model saved, and put back: what adapters do that change weights of the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ftrun.models.quiet import without_bars
from ftrun.quant.base import keep_unpacked


def save_model(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write ``folder``/model in the transformers format, with the tokenizer where there is one.

    Weights are written as they are: in float32 where they trained, which no later rounding can take from them.
    """
    target = folder / "model"
    with without_bars():
        model.save_pretrained(target)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    return target


def load_again(model: Any, folder: Path) -> Any:
    """The weights in ``folder``, loaded with the class, attention, quantisation and device of ``model``, and its dtype.

    Weights that were trained in float32 stay float32: what a short training changed would be rounded away.
    """
    config = model.config
    arguments: dict[str, Any] = {"dtype": model.dtype, "attn_implementation": config._attn_implementation}
    if getattr(config, "quantization_config", None) is not None:
        arguments["quantization_config"] = config.quantization_config
    elif json.loads((folder / "config.json").read_text()).get("dtype") == "float32":
        arguments["dtype"] = torch.float32
    with without_bars():
        loaded = type(model).from_pretrained(folder, **arguments).to(model.device)
    keep_unpacked(loaded)
    return loaded
