"""A straight line down."""

from __future__ import annotations

from dataclasses import dataclass

from ftrun.registry import register
from ftrun.schedules.base import DecaySchedule


@register("schedule", "linear")
@dataclass
class Linear(DecaySchedule):
    """A linear warm-up, then a straight line from the peak to ``minimum`` at the last step."""

    def after_warmup(self, step: int, total: int) -> float:
        return self.down_to_minimum(1 - step / total)
