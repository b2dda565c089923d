"""Rows that optimal transport sends the queries to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.geometry.nearest import by_mass, similarity_of
from ftrun.select.geometry.transport import sinkhorn

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "uot")
@dataclass
class Uot(Picker):
    """Rows by the mass that unbalanced optimal transport brings them (Nayak et al., 2026, arXiv:2602.14696).

    Minimises <P, (1 - S) / 2> + epsilon sum P log P + penalty KL(P^T 1 | 1 / N): every query sends 1 / M, and rows may
    get more or less than their even share at a small price. Rows are ranked by what arrives.
    """

    epsilon: float = 0.01  # entropic smoothing
    penalty: float = 0.0001  # price of uneven mass on the rows
    iterations: int = 1000  # at most
    threshold: float = 1e-6  # distance from the queries' masses at which the transport counts as settled

    needs_similarity: ClassVar[bool] = True

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        for knob in ("epsilon", "penalty", "iterations"):
            if not getattr(self, knob) > 0:
                raise ConfigError(f"{knob} is above 0", f"select.picker.{knob}={getattr(self, knob)}")
        candidates = np.sort(candidates)
        plan = sinkhorn(
            similarity_of(table).matrix,
            candidates,
            slope=0.5,
            epsilon=self.epsilon,
            ctx=ctx,
            row_penalty=self.penalty,
            threshold=self.threshold,
            iterations=self.iterations,
        )
        return budget.take(by_mass(plan.mass, candidates), table.lengths)
