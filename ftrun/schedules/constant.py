"""The peak learning rate throughout."""

from __future__ import annotations

from dataclasses import dataclass

from ftrun.registry import register
from ftrun.schedules.base import Schedule


@register("schedule", "constant")
@dataclass
class Constant(Schedule):
    """No warm-up and no decay: the factor is 1 at every step."""

    def factor(self, step: int, total: int) -> float:
        return 1.0
