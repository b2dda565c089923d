"""Rows of .jsonl and .json files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftrun.data.lines import lines
from ftrun.data.paths import suffix_of
from ftrun.data.raw import Raw, Reading
from ftrun.data.splits import ALIASES, choose
from ftrun.errors import DataError

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a pair, or a whole one
BLANK = re.compile(r"[\s,]*")


class Doubled(ValueError):
    """An object that gives one key twice."""

    def __init__(self, key: str):
        super().__init__(f"the key {json.dumps(key)} stands twice in one object")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise Doubled(next(key for at, key in enumerate(keys) if key in keys[:at]))
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def read_jsonl(path: Path, reading: Reading) -> Iterator[Raw]:
    """One object a line; a file that begins with a list is read as the JSON that it is. Raises DataError."""
    packed = suffix_of(path)[1]
    first = True
    for line in lines(path):
        if not line.text.strip():
            continue
        if first and _begins_list(line.text):
            yield from _read_whole(path, reading)
            return
        first = False
        fields = parse_line(line.text, path, line.number)
        yield Raw(fields, str(path), line.number, -1 if packed else line.start, line.length)


def read_json(path: Path, reading: Reading) -> Iterator[Raw]:
    """A list of rows, {"data": [...]} or {"train": [...]}; one object a line is read as the jsonl that it is.

    Lines are row numbers. Raises DataError.
    """
    yield from (read_jsonl if _is_jsonl(path) else _read_whole)(path, reading)


def parse_line(line: str, path: Path, number: int) -> dict[str, Any]:
    """The object on one line of a jsonl. Raises DataError."""
    where = f"{path}:{number}"
    try:
        fields = DECODER.decode(line)
    except Doubled as error:
        raise DataError(f"line {number} of {path}: {error}", where, "Keep one of them.") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", str(error))
        raise DataError(
            f"line {number} of {path} is not JSON: {reason}", where, "Repair or remove that line."
        ) from error
    return _row(fields, line, str(path), number)


def _row(fields: Any, text: str, file: str, number: int) -> dict[str, Any]:
    where = f"{file}:{number}"
    if not isinstance(fields, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(fields), "a bare value")
        raise DataError(
            f"row {number} of {file} is {kind}, not an object with named fields",
            where,
            'Write {"prompt": ..., "completion": ...} or another known layout.',
        )
    if SURROGATE.search(text):
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(
                f"row {number} of {file} holds half of a surrogate pair, which is not text", where, "Repair the row."
            ) from None
    return fields


def _begins_list(line: str) -> bool:
    """Whether this first line begins a list of rows; deep nesting is left to the parser of lines to refuse."""
    return line.lstrip().startswith("[") and not line.lstrip().startswith("[[")


def _is_jsonl(path: Path) -> bool:
    """Whether the first line that is not blank is a whole row."""
    for line in lines(path):
        if line.text.strip():
            try:
                first = json.loads(line.text)
            except (ValueError, RecursionError):
                return False
            return isinstance(first, dict) and not isinstance(first.get("data"), list) and not _splits(first)
    return False


def _read_whole(path: Path, reading: Reading) -> Iterator[Raw]:
    text = "".join(line.text for line in lines(path))
    if not text.strip():
        return
    rows = _rows(_parse_whole(text, path), path, reading)
    odd = text if SURROGATE.search(text) else ""
    for number, fields in enumerate(rows, start=1):
        yield Raw(_row(fields, odd, str(path), number), str(path), number)


def _parse_whole(text: str, path: Path) -> Any:
    try:
        return DECODER.decode(text)
    except Doubled as error:
        line = _line_of_doubled(text)
        raise DataError(f"{path}, the row that begins on line {line}: {error}", f"{path}:{line}", "Keep one.") from None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(
            f"line {line} of {path} is not JSON: {getattr(error, 'msg', error)}", f"{path}:{line}", "Repair the file."
        ) from error


def _rows(content: Any, path: Path, reading: Reading) -> list[Any]:
    rows = content.get("data") if isinstance(content, dict) else content
    if splits := _splits(content):
        rows = splits[choose(splits, reading, str(path))]
    if not isinstance(rows, list):
        raise DataError(
            f'{path} is neither a list of rows nor {{"data": [...]}} nor {{"train": [...]}}',
            str(path),
            "Write a list of rows, or one row a line in a .jsonl.",
        )
    return rows


def _splits(content: Any) -> dict[str, list[Any]]:
    """The splits of {"train": [rows], "test": [rows]}."""
    if not isinstance(content, dict) or not content.keys() & ALIASES.keys():
        return {}
    lists = {name: rows for name, rows in content.items() if isinstance(rows, list)}
    whole = len(lists) == len(content) and all(isinstance(row, dict) for rows in lists.values() for row in rows)
    return lists if whole else {}


def _line_of_doubled(text: str) -> int:
    """The line on which the row of a list begins that gives a key twice."""
    at = text.find("[") + 1
    while at < len(text):
        at = BLANK.match(text, at).end()  # type: ignore[union-attr]
        try:
            _, end = DECODER.raw_decode(text, at)
        except ValueError:
            break
        at = end
    return text.count("\n", 0, at) + 1
