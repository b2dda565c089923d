"""A row as it was read, and what the readers of files are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Raw:
    """A row as it was read. ``line`` counts from 1; where a format has no lines it is the row's number."""

    fields: dict[str, Any]
    file: str
    line: int
    start: int = -1  # where the line starts in an unpacked jsonl, in bytes; -1: nowhere
    length: int = 0  # bytes of that line


@dataclass
class Reading:
    """How a source is to be read, and what was found on the way."""

    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the source's name
    splits: bool = False  # whether the source has splits, so that ``split`` chose
    notes: list[str] = field(default_factory=list)  # what a user should be told

    def note(self, text: str) -> None:
        """Say it once."""
        if text not in self.notes:
            self.notes.append(text)

    def ours(self, column: str) -> str:
        """Our name of a column of the source."""
        return next((ours for ours, theirs in self.columns.items() if theirs == column), column)
