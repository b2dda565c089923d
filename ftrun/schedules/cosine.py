"""Half a cosine down."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ftrun.registry import register
from ftrun.schedules.base import DecaySchedule


@register("schedule", "cosine")
@dataclass
class Cosine(DecaySchedule):
    """Cosine annealing without restarts (Loshchilov and Hutter, 2017, arXiv:1608.03983), after a linear warm-up.

    With ``p`` the share of the steps after the warm-up that are done, the way left to ``minimum`` is
    ``(1 + cos(pi p)) / 2``.
    """

    def after_warmup(self, step: int, total: int) -> float:
        return self.down_to_minimum((1 + math.cos(math.pi * step / total)) / 2)
