"""Rows as the bytes that a compressor sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftrun.data.records import Record


def row_bytes(record: Record) -> bytes:
    """All texts of a row in UTF-8, a line each."""
    return "".join(text + "\n" for text in record.texts).encode()
