"""A LoRA that does not start at zero: saving only what was learned since."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from ftrun.adapters.peft_adapter import name_base


def save_difference(model: Any, start: dict[str, Tensor], folder: Path) -> Path:
    """Write ``s B A - s B0 A0`` as an ordinary LoRA of rank 2r on the original base: ``[B, -B0] [A; A0]``."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    first = get_peft_model_state_dict(model, state_dict=model.state_dict() | start, save_embedding_layers=False)
    for name in state:
        if ".lora_A." in name:
            state[name] = torch.cat([state[name], first[name]], dim=0)
        elif ".lora_B." in name:
            state[name] = torch.cat([state[name], -first[name]], dim=1)
    config = copy.deepcopy(model.peft_config["default"])
    factor = math.sqrt(2) if config.use_rslora else 2  # keeps the scale: alpha / sqrt(r), or alpha / r
    config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * factor
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}
    config.init_lora_weights, config.corda_config, config.lora_ga_config = True, None, None
    config.inference_mode = True
    name_base(config, model.get_base_model())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
    return folder
