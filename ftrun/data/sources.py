"""Raw rows, with the file and line they come from, out of whatever a user names as ``data.path``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from ftrun.data.builtin import builtin_rows
from ftrun.data.hub import refuse_without_hub
from ftrun.data.paths import local_files, near_file, suffix_of
from ftrun.errors import DataError, nearest


@dataclass(frozen=True)
class Raw:
    """A row as it was read. ``line`` counts from 1; where a format has no lines it is the row's number."""

    fields: dict[str, Any]
    file: str
    line: int
    start: int = -1  # where the line starts in an unpacked jsonl, in bytes; -1: nowhere
    length: int = 0  # bytes of that line


def read(path: str, split: str = "train") -> Iterator[Raw]:
    """Rows of a file, folder, glob, hub id or builtin:NAME[:ROWS], in order. Raises DataError."""
    if path.startswith("builtin:"):
        for number, fields in enumerate(builtin_rows(path), start=1):
            yield Raw(fields, path, number)
        return
    found = local_files(path)
    if found is None:
        yield from _read_hub(path, split)
        return
    for file in found:
        try:
            yield from read_arrow(file, split) if file.is_dir() else read_file(file)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}", str(file)) from error


# ---- one file ----


def read_file(path: Path) -> Iterator[Raw]:
    """Rows of one .json, .jsonl, .csv or .parquet file, the first three also packed."""
    suffix, _ = suffix_of(path)
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}[suffix]
    empty = True
    for raw in reader(path):
        empty = False
        yield raw
    if empty:
        raise DataError(f"{path} holds no rows", str(path), "Give a file with at least one row.")


def open_bytes(path: Path) -> io.BufferedReader:
    """The file's bytes, unpacked if its name ends in .gz or .zst."""
    _, packed = suffix_of(path)
    if not packed:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[packed]))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Line:
    number: int
    text: str
    start: int  # bytes
    length: int


def _lines(path: Path) -> Iterator[_Line]:
    """Lines with their ends; split at newlines only, since JSON strings may hold other line separators."""
    with open_bytes(path) as stream:
        number = start = 0
        try:
            for number, line in enumerate(stream, start=1):
                yield _Line(number, line.decode("utf-8-sig" if number == 1 else "utf-8"), start, len(line))
                start += len(line)
        except UnicodeDecodeError as error:
            raise DataError(
                f"line {number} of {path} is not UTF-8: {error.reason}",
                f"{path}:{number}",
                "Convert the file to UTF-8.",
            ) from error


def parse_line(line: str, path: Path, number: int) -> dict[str, Any]:
    """The object on one line of a jsonl."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", str(error))
        raise DataError(
            f"line {number} of {path} is not JSON: {reason}", f"{path}:{number}", "Repair or remove that line."
        ) from error
    return _object(fields, str(path), number)


def _object(fields: Any, file: str, number: int) -> dict[str, Any]:
    if not isinstance(fields, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(fields), "a bare value")
        raise DataError(
            f"row {number} of {file} is {kind}, not an object with named fields",
            f"{file}:{number}",
            'Write {"prompt": ..., "completion": ...} or another known layout.',
        )
    return fields


def _read_jsonl(path: Path) -> Iterator[Raw]:
    packed = suffix_of(path)[1]
    for line in _lines(path):
        if line.text.strip():
            fields = parse_line(line.text, path, line.number)
            yield Raw(fields, str(path), line.number, -1 if packed else line.start, line.length)


def _read_json(path: Path) -> Iterator[Raw]:
    """A list of rows, or {"data": [...]}; a file of one object a line is read as the jsonl that it is. Lines are row numbers."""
    if _is_jsonl(path):
        yield from _read_jsonl(path)
        return
    text = "".join(line.text for line in _lines(path))
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(
            f"line {line} of {path} is not JSON: {getattr(error, 'msg', error)}", f"{path}:{line}", "Repair the file."
        ) from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(
            f'{path} is neither a list of rows nor {{"data": [...]}}',
            str(path),
            "Write a list of rows, or one row a line in a .jsonl.",
        )
    for number, fields in enumerate(rows, start=1):
        yield Raw(_object(fields, str(path), number), str(path), number)


def _is_jsonl(path: Path) -> bool:
    """Whether the first line that is not blank is a whole row."""
    for line in _lines(path):
        if line.text.strip():
            try:
                first = json.loads(line.text)
            except (ValueError, RecursionError):
                return False
            return isinstance(first, dict) and not isinstance(first.get("data"), list)
    return False


def _read_csv(path: Path) -> Iterator[Raw]:
    csv.field_size_limit(2**31 - 1)  # a document in one cell is usual here
    reader = csv.reader(line.text for line in _lines(path))
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"line {number} of {path} is not CSV: {error}", f"{path}:{number}") from error
        if cells is None:
            return
        if header is None:
            header = cells
            if len(set(header)) < len(header):
                raise DataError(f"{path} has two columns of one name", f"{path}:1", "Rename one: " + ", ".join(header))
        elif cells:
            if len(cells) != len(header):
                raise DataError(
                    f"line {number} of {path} has {len(cells)} cells, the header has {len(header)}",
                    f"{path}:{number}",
                    "Quote cells that hold commas or line breaks.",
                )
            yield Raw(dict(zip(header, cells, strict=True)), str(path), number)


def _read_parquet(path: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a whole parquet file", str(path), str(error).splitlines()[0]) from error
    number = 0
    with file:
        for batch in file.iter_batches(batch_size=512):
            for fields in batch.to_pylist():
                number += 1
                yield Raw(_plain(fields, str(path), number), str(path), number)


def read_arrow(folder: Path, split: str) -> Iterator[Raw]:
    """Rows of what ``datasets.save_to_disk`` wrote."""
    import datasets

    data = datasets.load_from_disk(str(folder))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f'{folder} has no split "{split}"', f"data.split={split}", nearest(split, map(str, data)))
        data = data[split]
    yield from _rows_of_dataset(data, str(folder))


def _rows_of_dataset(data: Any, name: str) -> Iterator[Raw]:
    number = 0
    for number, fields in enumerate(data, start=1):
        yield Raw(_plain(fields, name, number), name, number)
    if not number:
        raise DataError(f"{name} holds no rows", name)


def _plain(value: Any, file: str, number: int) -> Any:
    """``value`` as JSON knows it."""
    if isinstance(value, dict):
        return {str(key): _plain(item, file, number) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, file, number) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, date | time | Decimal):
        return str(value)
    raise DataError(
        f"row {number} of {file} holds a {type(value).__name__}, which is not text",
        f"{file}:{number}",
        "Leave such columns out.",
    )


def _read_hub(path: str, split: str) -> Iterator[Raw]:
    name, _, config = path.partition(":")
    refuse_without_hub(path, near_file(Path(path)))
    import datasets

    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # whatever the hub's client raises, the user needs one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f'"{path}" cannot be loaded from the hub: {reason}',
            f"data.path={path} data.split={split}",
            "Check the name, or give a local file.",
        ) from error
    yield from _rows_of_dataset(data, path)
