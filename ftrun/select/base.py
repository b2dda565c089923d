"""What selection is made of: a scorer gives every row numbers, a picker turns numbers and a budget into rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context
    from ftrun.training.scoring import Similarity


@dataclass
class Table:
    """Scores of a pool. ``columns`` map a name to (rows,) float64; NaN = cannot be scored."""

    columns: dict[str, np.ndarray]
    lengths: np.ndarray  # (rows,) tokens of each row, prompt and response
    pool: Pool | None = None  # the rows themselves, for pickers that look at more than scores
    embeddings: np.ndarray | None = None  # (rows, width), unit length, when a scorer or picker made them
    similarity: Similarity | None = None  # to the queries, from scorers that look for something
    reasons: dict[int, str] = field(default_factory=dict)  # row -> why it has no score
    duplicate_of: np.ndarray | None = None  # (rows,) place of the row that each repeats, or -1, where that was asked

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass
class Budget:
    """How much to pick; exactly one of the two is set."""

    rows: int | None = None
    tokens: int | None = None

    def take(self, ranked: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The longest prefix of ``ranked`` rows (places in the pool) within the budget."""
        if self.rows is not None:
            return ranked[: self.rows]
        assert self.tokens is not None
        spent = np.cumsum(lengths[ranked])
        return ranked[: int(np.searchsorted(spent, self.tokens, side="right"))]


@dataclass
class PlannedTraining:
    """A training that a selection makes on its way, for `ftrun plan`."""

    rows: int
    epochs: int
    batch_size: int
    full: bool = False  # of all weights, not of adapters

    @property
    def steps(self) -> int:
        return -(-self.rows * self.epochs // min(self.batch_size, self.rows)) if self.rows else 0


@dataclass
class Scorer:
    """Base of scorers."""

    needs: ClassVar[dict[str, str]] = {}
    lacks: ClassVar[dict[str, str]] = {}
    column: ClassVar[str] = "score"  # the column that pickers rank by, higher first
    passes: ClassVar[float] = 0.0  # forward passes over a row's tokens, for `ftrun plan`
    own_picker: ClassVar[str] = "top_k"  # the picker of the paper
    gives_similarity: ClassVar[bool] = False  # says how near rows are to queries (Table.similarity)

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Columns of (rows,) floats; NaN marks a row that cannot be scored."""
        raise NotImplementedError

    def planned_tokens(self, lengths: np.ndarray) -> float:
        """About how many tokens scoring rows of these lengths puts through the model, for `ftrun plan`."""
        return float(lengths.sum()) * self.passes

    def planned_trainings(self, rows: int) -> list[PlannedTraining]:
        """What scoring a pool of so many rows trains on the way, for `ftrun plan`."""
        return []

    def files(self) -> list[str]:
        """Files of rows that knobs name: what they hold belongs to the key of the stage cache."""
        return []

    def keep(self, table: Table) -> np.ndarray:
        """Rows that the method admits at all, (rows,) bool; the paper's filter."""
        return ~np.isnan(table.columns[self.column])


@dataclass
class Picker:
    """Base of pickers."""

    needs: ClassVar[dict[str, str]] = {}
    lacks: ClassVar[dict[str, str]] = {}
    budget_use: ClassVar[Literal["required", "optional", "none"]] = "required"
    needs_scores: ClassVar[bool] = True  # ranks by a column; False: works with select=none too
    needs_similarity: ClassVar[bool] = False  # picks by how near rows are to queries
    orders: ClassVar[bool] = False  # has `passes`: training sees the rows in its order, not in one drawn anew

    def stands_for(self, scorer: Scorer) -> Picker:
        """The picker that picks for this scorer: itself, unless it stands for another."""
        return self

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        """Places in the pool of the picked rows, best first, out of ``candidates`` (places). ``column`` is ranked higher first.

        Ties break by the lower place.
        """
        raise NotImplementedError

    def planned_trainings(self, rows: int) -> list[PlannedTraining]:
        """What picking so many rows trains on the way, for `ftrun plan`."""
        return []

    def models(self) -> list[str]:
        """Models that knobs name: what they hold belongs to the key of the stage cache."""
        return []

    def passes(self, score: np.ndarray, batch_size: int, seed: int) -> list[np.ndarray]:
        """Positions of the rows of the first passes of training; it shuffles all rows for those that follow.

        ``score``: (rows,) of the rows to train on, in their order; ``batch_size``: rows of an optimiser step.
        """
        raise NotImplementedError


def ranked(table: Table, candidates: np.ndarray, column: str) -> np.ndarray:
    """The candidates by falling score, ties by id; a NaN comes last."""
    candidates = np.sort(candidates)
    return candidates[np.argsort(-table.columns[column][candidates], kind="stable")]
