"""The lines of a text file, unpacked, as UTF-8."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftrun.data.paths import suffix_of
from ftrun.errors import DataError

UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Line:
    number: int  # from 1
    text: str
    start: int  # bytes
    length: int


def open_bytes(path: Path) -> io.BufferedReader:
    """The file's bytes, unpacked if its name ends in .gz or .zst."""
    _, packed = suffix_of(path)
    if not packed:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[packed]))  # type: ignore[arg-type]


def lines(path: Path) -> Iterator[Line]:
    """Lines with their ends; split at newlines only, since JSON strings may hold other line separators.

    Raises DataError for what is not UTF-8 text.
    """
    with open_bytes(path) as stream:
        start = 0
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = "it is UTF-16" if number == 1 and line.startswith(UTF16) else error.reason
                raise DataError(
                    f"line {number} of {path} is not UTF-8: {reason}", f"{path}:{number}", "Convert the file to UTF-8."
                ) from error
            if "\0" in text:
                raise DataError(
                    f"line {number} of {path} holds a NUL byte, which no text has",
                    f"{path}:{number}",
                    "The file is damaged, or not UTF-8: convert or repair it.",
                )
            yield Line(number, text, start, len(line))
            start += len(line)
