"""NF4: four-bit base weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.quant.base import Quant, freeze_for_training
from ftrun.registry import register

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK, SUPERBLOCK = 64, 256  # weights that share an absmax; absmax values that share a scale


@register("quant", "nf4")
@dataclass
class Nf4(Quant):
    """4-bit NormalFloat with double quantisation (Dettmers et al., 2023, arXiv:2305.14314).

    Every linear layer but the head is cut into blocks of 64 weights; each block is divided by its largest magnitude
    and rounded to 16 levels, the quantiles of a normal distribution with an exact zero. ``double_quant`` stores those
    magnitudes in 8 bits, in blocks of 256 with one float32 scale. Weights are dequantised inside each layer's product.
    """

    lacks: ClassVar[dict[str, str]] = {"trainable_base": "freezes them in 4 bits"}

    double_quant: bool = True  # quantise the block constants too: 0.127 instead of 0.5 bits a weight

    def load_arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
        return {"quantization_config": config}

    def prepare(self, model: nn.Module) -> nn.Module:
        return freeze_for_training(model)

    def bits(self) -> float:
        constants = 8 / BLOCK + 32 / (BLOCK * SUPERBLOCK) if self.double_quant else 32 / BLOCK
        return 4 + constants
