"""Continued pre-training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ftrun.objectives.base import Kind, TokenLoss
from ftrun.registry import register


@register("objective", "text")
@dataclass
class Text(TokenLoss):
    """Cross-entropy on every token of plain text, the end-of-text token included."""

    kind: ClassVar[Kind] = "text"
