"""A filter for plain text: documents that are lists of scraps, repeat themselves, or come twice."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Scorer, Table

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context


@register("select", "text_quality")
@dataclass
class TextQuality(Scorer):
    """Leaves out documents of few lines, of mostly short lines, with much repetition, and copies (Faroz, 2025, arXiv:2504.09687).

    A document stays with at least ``minimum_lines`` lines that are not blank, at most ``short_share`` of them shorter
    than ``short_line`` characters, at most ``repeated_lines`` of them said before in it, and at most
    ``repeated_characters`` of its characters in such lines (bounds of repetition: Rae et al., 2021, arXiv:2112.11446).
    Of documents with equal text the first stays. Quality, by which a budget cuts, is the share of characters in lines
    that are neither short nor repeated. No model is run.
    """

    minimum_lines: int = 3  # lines that a document needs
    short_line: int = 30  # characters below which a line is short
    short_share: float = 0.5  # share of short lines that is borne
    repeated_lines: float = 0.3  # share of lines that is borne as repetition
    repeated_characters: float = 0.2  # share of characters in repeated lines that is borne

    column: ClassVar[str] = "quality"

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Quality and what the filter looks at, (rows,) each; NaN for a row without text."""
        measured = np.array([self.measure("\n".join(record.texts)) for record in pool]).reshape(-1, 5)
        for place in np.flatnonzero(np.isnan(measured[:, 0])).tolist():
            ctx.scorer.reasons[place] = "no text"
        quality, lines, short, repeated, characters = measured.T
        copy = np.ones(len(pool))
        copy[np.unique(pool.hashes, return_index=True)[1]] = 0
        return {
            "quality": quality,
            "lines": lines,
            "short_lines": short,
            "repeated_lines": repeated,
            "repeated_characters": characters,
            "copy": copy,
        }

    def measure(self, text: str) -> tuple[float, ...]:
        """Quality, number of lines, shares of short and of repeated lines, share of characters in repeated lines."""
        lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
        if not lines:
            return (np.nan,) * 5
        lengths = np.array([len(line) for line in lines])
        short, repeated, seen = lengths < self.short_line, np.zeros(len(lines), bool), set()
        for number, line in enumerate(lines):
            repeated[number] = line in seen
            seen.add(line)
        sound = lengths[~short & ~repeated].sum() / lengths.sum()
        return sound, len(lines), short.mean(), repeated.mean(), lengths[repeated].sum() / lengths.sum()

    def keep(self, table: Table) -> np.ndarray:
        found = table.columns
        return (
            (found["lines"] >= self.minimum_lines)
            & (found["short_lines"] <= self.short_share)
            & (found["repeated_lines"] <= self.repeated_lines)
            & (found["repeated_characters"] <= self.repeated_characters)
            & (found["copy"] == 0)
        )
