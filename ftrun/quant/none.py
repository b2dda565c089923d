"""Plain weights."""

from __future__ import annotations

from dataclasses import dataclass

from ftrun.quant.base import Quant
from ftrun.registry import register


@register("quant", "none")
@dataclass
class NoQuant(Quant):
    """Weights are loaded in the model's dtype and may train."""
