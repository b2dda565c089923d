"""What a schedule is: a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass
class Schedule:
    needs: ClassVar[dict[str, str]] = {}
    lacks: ClassVar[dict[str, str]] = {}

    def factor(self, step: int, total: int) -> float:
        """What the peak learning rate is multiplied with at optimiser step ``step`` (from 0) of ``total``."""
        raise NotImplementedError
