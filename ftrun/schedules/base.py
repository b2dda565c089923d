"""What a schedule is: a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ftrun.errors import ConfigError


@dataclass
class Schedule:
    needs: ClassVar[dict[str, str]] = {}
    lacks: ClassVar[dict[str, str]] = {}

    def factor(self, step: int, total: int) -> float:
        """What the peak learning rate is multiplied with at optimiser step ``step`` (from 0) of ``total``."""
        raise NotImplementedError


@dataclass
class WarmupSchedule(Schedule):
    """Rises linearly from 0 at step 0 to 1 at step ``warmup``, then follows ``after_warmup``."""

    warmup: float = 0.03  # warm-up: a share of all steps if below 1, else a number of steps

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ConfigError(
                f"a warm-up cannot last {self.warmup:g}", f"schedule.warmup={self.warmup:g}", "Give 0 or more."
            )

    def warmup_steps(self, total: int) -> int:
        """A share leaves at least the last step to the peak: a run of one step would else learn nothing."""
        if self.warmup < 1:
            return min(math.ceil(self.warmup * total), total - 1)
        return math.ceil(self.warmup)

    def factor(self, step: int, total: int) -> float:
        warmup = self.warmup_steps(total)
        if step < warmup:
            return step / warmup
        return self.after_warmup(min(step, total) - warmup, max(1, total - warmup))

    def after_warmup(self, step: int, total: int) -> float:
        """The factor at ``step`` of the ``total`` steps that follow the warm-up."""
        raise NotImplementedError


@dataclass
class DecaySchedule(WarmupSchedule):
    """A warm-up, and a decay that ends at ``minimum``."""

    minimum: float = 0.0  # factor at the end, as a share of the peak

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.minimum <= 1:
            where = f"schedule.minimum={self.minimum:g}"
            raise ConfigError(
                "schedule.minimum is a share of the peak learning rate", where, "Give a number from 0 to 1."
            )

    def down_to_minimum(self, share: float) -> float:
        """``share`` of the way above the minimum: 1 is the peak, 0 the minimum."""
        return self.minimum + (1 - self.minimum) * share
