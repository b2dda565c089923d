"""The peak learning rate after a warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from ftrun.registry import register
from ftrun.schedules.base import WarmupSchedule


@register("schedule", "constant_with_warmup")
@dataclass
class ConstantWithWarmup(WarmupSchedule):
    """A linear warm-up, then a factor of 1."""

    def after_warmup(self, step: int, total: int) -> float:
        return 1.0
