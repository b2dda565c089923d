"""A threshold that is high for the first batches of training, and low afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.errors import ConfigError, DataError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table, ranked

if TYPE_CHECKING:
    from ftrun.training.context import Context


@register("picker", "igf")
@dataclass
class Igf(Picker):
    """Rows that pass a threshold T, which falls once training has begun (Antonello et al., 2021, arXiv:2005.00175).

    Training goes through the rows in random order and passes over those whose score is below T. Until ``first_batches``
    batches are full T is ``first``, then ``later``; a batch always holds as many rows as any other. Scores do not change
    while training, so what the filter lets pass, and when, is known before it begins.
    """

    first: float = 1.0  # T for the first batches
    first_batches: int = 10  # how many those are, of train.batch_size rows each
    later: float = -1.0  # T for all others

    budget_use: ClassVar[Literal["required", "optional", "none"]] = "optional"
    orders: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.first_batches < 0:
            raise ConfigError("first_batches must not be negative", f"select.picker.first_batches={self.first_batches}")
        if self.first < self.later:
            raise ConfigError(
                "the threshold falls: first is at least as high as later",
                f"select.picker.first={self.first:g} select.picker.later={self.later:g}",
            )

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        """All rows that pass the later threshold, which are those that training may see, highest scores first."""
        order = ranked(table, candidates, column)
        return budget.take(order[table.columns[column][order] >= self.later], table.lengths)

    def passes(self, score: np.ndarray, batch_size: int, seed: int) -> list[np.ndarray]:
        """What the filter lets pass in as many passes as the first batches need; the later threshold passes all rows given.

        Raises DataError when no row passes the first threshold.
        """
        early = score >= self.first
        left = self.first_batches * batch_size  # rows that the first threshold still has to let pass
        if left and not early.any():
            raise DataError(
                f"no row passes the threshold of the first {self.first_batches} batches: the highest score is "
                f"{np.nanmax(score, initial=-np.inf):.3g}",
                f"select.picker.first={self.first:g}",
                "Lower select.picker.first, or do without it: select.picker.first_batches=0.",
            )
        made: list[np.ndarray] = []
        while left:
            order = np.random.default_rng([seed, len(made)]).permutation(len(score))
            passed = np.flatnonzero(early[order])[:left]
            left -= len(passed)
            rest = order[:0] if left else order[passed[-1] + 1 :]
            made.append(np.concatenate([order[passed], rest]))
        return made
