"""Every trained token counts as it is."""

from __future__ import annotations

from dataclasses import dataclass

from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy


@register("tokens", "none")
@dataclass
class NoPolicy(TokenPolicy):
    """Plain training: the loss weights of the data, unchanged."""
