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


def keep_unpacked(model: nn.Module) -> None:
    """Leave 4-bit weights in the layout that training reads, whatever the processor.

    On CPUs with AVX512-BF16 bitsandbytes packs a weight for inference in the first evaluation; no gradient passes the
    packed product, and the weight is never unpacked again.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def freeze_for_training(model: nn.Module) -> nn.Module:
    """Freeze a quantised model; norms, embeddings and head keep the model's dtype."""
    keep_unpacked(model)
    return model.requires_grad_(False)
