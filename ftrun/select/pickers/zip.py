"""Rows that compress badly together."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.scoring.compressed import row_bytes

if TYPE_CHECKING:
    from ftrun.training.context import Context

TRIALS_PER_SECOND = 5_000  # rows tried behind what is chosen, of a few hundred bytes each
SLOW = 60.0  # seconds from which the time is worth telling


@register("picker", "zip")
@dataclass
class ZipPicker(Picker):
    """Greedy lowest compression ratio of all that is chosen (Yin et al., 2024, "Entropy Law", arXiv:2407.06645).

    Round by round: the ``first`` rows with the lowest ratio known of each are tried behind what is chosen, which renews
    their ratios; of these the ``second`` lowest stay; of them ``third`` are taken one at a time, each time the one
    with which everything chosen has the lowest ratio bytes / bytes after zlib (level 9). Ties go to the lower id.

    Deflate looks back 32 KB and its state can be copied, so that trying a row costs the same however much is chosen:
    the time grows with the budget, not with its square. Scores play no part beyond the scorer's filter.
    """

    first: int = 10_000  # rows tried in every round
    second: int = 200  # of these, rows that may be taken
    third: int = 100  # of these, rows that are taken

    needs_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("first", "second", "third"):  # a stage that lets nothing through would never end
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"select.picker.{name} must be at least 1", f"select.picker.{name}={getattr(self, name)}"
                )

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        pool = table.pool
        assert pool is not None
        rows = np.sort(candidates)
        texts = {row: row_bytes(pool[int(pool.ids[row])]) for row in rows.tolist()}
        ratio = np.array([len(text) / len(zlib.compress(text, 9)) if text else 1.0 for text in texts.values()])
        left, chosen, archive = np.ones(len(rows), bool), [], Archive()
        self._announce(table, len(rows), budget, ctx)
        with ctx.report.task("pick rows", None, unit="rows") as task:
            while left.any() and _wants_more(budget, rows[chosen], table.lengths):
                tried = _lowest(np.flatnonzero(left), ratio, self.first)
                ratio[tried] = [archive.ratio_with(texts[row]) for row in rows[tried].tolist()]
                allowed = _lowest(tried, ratio, self.second).tolist()
                room = self.third if budget.rows is None else budget.rows - len(chosen)
                for _ in range(min(self.third, len(allowed), room)):
                    best = min(allowed, key=lambda place: (archive.ratio_with(texts[int(rows[place])]), place))
                    allowed.remove(best)
                    archive.add(texts[int(rows[best])])
                    chosen.append(best)
                    left[best] = False
                    task.advance(1)
        return budget.take(rows[chosen], table.lengths)

    def _announce(self, table: Table, rows: int, budget: Budget, ctx: Context) -> None:
        share = budget.rows if budget.rows is not None else (budget.tokens or 0) / max(1.0, float(table.lengths.mean()))
        rounds = min(share, rows) / self.third
        trials = rounds * (min(self.first, rows) + self.third * (min(self.second, rows) - self.third / 2))
        if trials / TRIALS_PER_SECOND > SLOW:
            ctx.report.note(f"zip tries {trials:,.0f} rows: about {trials / TRIALS_PER_SECOND / 60:.0f} minutes")


class Archive:
    """Texts compressed one after the other, into which another can be tried without putting it there."""

    def __init__(self) -> None:
        self._stream: Any = zlib.compressobj(9)
        self._written = 0  # bytes that the stream has given out
        self._read = 0  # bytes that went in

    def add(self, text: bytes) -> None:
        self._written += len(self._stream.compress(text))
        self._read += len(text)

    def ratio_with(self, text: bytes) -> float:
        """Bytes / compressed bytes of all texts and this one; 1 for nothing at all."""
        trial = self._stream.copy()
        compressed = self._written + len(trial.compress(text)) + len(trial.flush())
        return (self._read + len(text)) / compressed if self._read + len(text) else 1.0


def _wants_more(budget: Budget, chosen: np.ndarray, lengths: np.ndarray) -> bool:
    if budget.rows is not None:
        return len(chosen) < budget.rows
    return len(budget.take(chosen, lengths)) == len(chosen)


def _lowest(places: np.ndarray, ratio: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` places with the lowest ratio; ties by place."""
    return places[np.argsort(ratio[places], kind="stable")][:count]
