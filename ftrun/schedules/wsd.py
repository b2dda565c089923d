"""Warm-up, stable, decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.schedules.base import DecaySchedule


@register("schedule", "wsd")
@dataclass
class Wsd(DecaySchedule):
    """Warm up, stay at the peak, decay at the very end (Hu et al., 2024, arXiv:2404.06395).

    The last ``decay`` of the run goes from the peak to ``minimum``. With ``p`` the share of that part that is done, the
    way left to ``minimum`` is ``1 - p`` (linear), ``(1 + cos(pi p)) / 2`` (cosine), or ``1 - sqrt(p)`` (sqrt: the
    best of those that Hägele et al., 2024, arXiv:2405.18392, compare).
    """

    decay: float = 0.1  # decay: a share of all steps if below 1, else a number of steps
    shape: Literal["linear", "cosine", "sqrt"] = "linear"  # curve of the decay

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay < 0:
            raise ConfigError(
                f"a decay cannot last {self.decay:g}", f"schedule.decay={self.decay:g}", "Give 0 or more."
            )

    def factor(self, step: int, total: int) -> float:
        warmup = self.warmup_steps(total)
        if step < warmup:
            return step / warmup
        wanted = math.ceil(self.decay * total) if self.decay < 1 else math.ceil(self.decay)
        decay = min(wanted, total - warmup)  # a long warm-up leaves less room to decay in
        done = min(step, total) - (total - decay)
        return self.after_warmup(done, decay) if done > 0 else 1.0

    def after_warmup(self, step: int, total: int) -> float:
        p = step / total
        left = {"linear": 1 - p, "cosine": (1 + math.cos(math.pi * p)) / 2, "sqrt": 1 - math.sqrt(p)}[self.shape]
        return self.down_to_minimum(left)
