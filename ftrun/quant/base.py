"""What a quantisation is: how the base weights are loaded, and what must be prepared before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass
class Quant:
    """Base of quantisations; the defaults load plain weights."""

    needs: ClassVar[dict[str, str]] = {}
    lacks: ClassVar[dict[str, str]] = {}

    def load_arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments for ``from_pretrained``, ``quantization_config`` above all."""
        return {}

    def prepare(self, model: nn.Module) -> nn.Module:
        """Freeze and cast what training on quantised weights needs."""
        return model

    def bits(self) -> float | None:
        """Storage bits of one weight of a quantised linear layer, constants included; None: the dtype decides."""
        return None


def freeze_for_training(model: nn.Module) -> nn.Module:
    """Freeze a quantised model, and hold norms, embeddings and head in float32."""
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
