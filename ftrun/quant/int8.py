"""LLM.int8(): eight-bit base weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.quant.base import Quant, freeze_for_training
from ftrun.registry import register

if TYPE_CHECKING:
    import torch
    from torch import nn


@register("quant", "int8")
@dataclass
class Int8(Quant):
    """LLM.int8() (Dettmers et al., 2022, arXiv:2208.07339).

    Each row of a weight is divided by its largest magnitude and rounded to 8 bits. Inputs are quantised the same way,
    except for feature columns with a magnitude above ``threshold``, which are multiplied in the model's dtype.
    """

    needs: ClassVar[dict[str, str]] = {"whole_weights": "keeps a scale for every row of a whole weight"}
    lacks: ClassVar[dict[str, str]] = {"trainable_base": "freezes them in 8 bits"}

    threshold: float = 6.0  # features above this magnitude are not quantised; 0 quantises all

    def load_arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        # it says on every product that inputs are cast to float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.threshold)}

    def prepare(self, model: nn.Module) -> nn.Module:
        return freeze_for_training(model)

    def bits(self) -> float:
        """Eight; the one float32 of each row is not counted, since its share depends on the row's width."""
        return 8.0
