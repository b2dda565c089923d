"""Rows of .csv and .tsv files."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.data.json_rows import DECODER, Doubled
from ftrun.data.lines import Line, lines
from ftrun.data.paths import suffix_of
from ftrun.data.raw import Raw, Reading
from ftrun.errors import DataError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
LISTS = {"messages", "conversations", "conversation", "history", "tools", "functions", "tool_calls"}
SEPARATOR = re.compile(r'"?sep=(.)"?\s*')  # a first line that spreadsheets write
TEXT_OR_TURNS = {"prompt", "completion", "chosen", "rejected"}


def read_csv(path: Path, reading: Reading) -> Iterator[Raw]:
    """Rows under the names of the header line, which also tells what stands between two cells. Raises DataError."""
    csv.field_size_limit(2**31 - 1)  # a document in one cell is usual here
    texts = lines(path)
    header = next((line for line in texts if line.text.strip()), None)
    if header is None:
        return
    told = SEPARATOR.fullmatch(header.text)
    if told:
        header = next(texts, header)
    layout = _header_of(header, told[1] if told else None, path)
    reader = csv.reader(
        (line.text for line in texts), delimiter=layout.delimiter, skipinitialspace=layout.spaced, strict=True
    )
    while True:
        number = header.number + reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"line {number} of {path} is not CSV: {error}",
                f"{path}:{number}",
                'Quote cells that hold quotes, and write a quote inside them twice: "".',
            ) from error
        if cells is None:
            return
        if cells:
            yield Raw(layout.fields(cells, number, path, reading), str(path), number)


@dataclass(frozen=True)
class _Header:
    names: list[str]
    delimiter: str
    spaced: bool  # a space follows the delimiters, here and then in the rows too

    def fields(self, cells: list[str], number: int, path: Path, reading: Reading) -> dict[str, Any]:
        if len(cells) != len(self.names):
            mark = DELIMITERS.get(self.delimiter, self.delimiter)
            raise DataError(
                f"line {number} of {path} has {len(cells)} cells, the header has {len(self.names)}",
                f"{path}:{number}",
                f"Quote cells that hold a {mark} or line breaks.",
            )
        return {name: unpacked(reading.ours(name), cell) for name, cell in zip(self.names, cells, strict=True)}


def _header_of(line: Line, told: str | None, path: Path) -> _Header:
    """What the header line says. Raises DataError where it can be read in two ways, or in none."""
    where = f"{path}:{line.number}"
    if told is None and suffix_of(path)[0] == ".tsv":
        told = "\t"
    found = {mark: header for mark in ([told] if told else DELIMITERS) if (header := _split(line.text, mark))}
    if not found:
        raise DataError(f"the header line of {path} is not CSV", where, "Close its quotes on the same line.")
    several = [mark for mark, header in found.items() if len(header.names) > 1]
    if len(several) > 1:
        marks = " and ".join(f"{DELIMITERS[mark]}s" for mark in several)
        raise DataError(
            f"the header of {path} holds {marks}: which stands between the columns?",
            where,
            "Quote the names that hold one of them.",
        )
    header = found[several[0]] if several else next(iter(found.values()))
    if len(set(header.names)) < len(header.names):
        raise DataError(f"{path} has two columns of one name", where, "Rename one: " + ", ".join(header.names))
    return header


def _split(line: str, delimiter: str) -> _Header | None:
    try:
        cells = next(csv.reader([line], delimiter=delimiter, strict=True))
        spaced = any(cell.startswith(" ") for cell in cells[1:])
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=spaced, strict=True))
    except csv.Error:
        return None
    return _Header([cell.strip() for cell in cells], delimiter, spaced)


def unpacked(name: str, cell: str) -> Any:
    """The cell, or the JSON (or Python) list in it where our column of that name holds one."""
    if name in LISTS:
        return _list_in(cell)
    if name in TEXT_OR_TURNS:
        found = _list_in(cell)
        if isinstance(found, list) and found and all(isinstance(turn, dict) and "role" in turn for turn in found):
            return found
    return cell


def _list_in(cell: str) -> Any:
    """What a data frame that was saved as csv writes for a list; the cell itself where it is none."""
    if not cell.strip().startswith(("[", "{")):
        return cell
    for parse in (DECODER.decode, ast.literal_eval):
        try:
            found = parse(cell.strip())
        except Doubled:
            return cell
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list | dict) and _is_json(found):
            return found
    return cell


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True
