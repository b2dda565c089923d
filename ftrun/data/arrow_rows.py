"""Rows of parquet files, of what ``datasets.save_to_disk`` wrote, and of data sets from the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ftrun.data.formats import NAMES
from ftrun.data.raw import Raw, Reading
from ftrun.data.splits import choose
from ftrun.errors import DataError

BATCH = 512  # rows made Python objects at a time


def read_parquet(path: Path, reading: Reading) -> Iterator[Raw]:
    """Rows of a parquet file. Raises DataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = text_columns(file.schema_arrow, str(path), reading)
            yield from _rows(file.iter_batches(batch_size=BATCH, columns=columns), str(path))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not a whole parquet file", str(path), (str(error) or "?").splitlines()[0]
        ) from error


def read_arrow(folder: Path, reading: Reading) -> Iterator[Raw]:
    """Rows of what ``datasets.save_to_disk`` wrote. Raises DataError."""
    import datasets
    import pyarrow

    try:
        data = datasets.load_from_disk(str(folder))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{folder} is not a whole data set: {reason}", str(folder), "Save it again.") from error
    if isinstance(data, datasets.DatasetDict):
        data = data[choose(map(str, data), reading, str(folder))]
    yield from rows_of_dataset(data, str(folder), reading)


def rows_of_dataset(data: Any, name: str, reading: Reading) -> Iterator[Raw]:
    """Rows of a ``datasets.Dataset``, images and sounds left as they lie. Raises DataError where there are none."""
    tables = data.with_format("arrow")
    columns = text_columns(data.features.arrow_schema, name, reading)
    batches = (table.select(columns) for table in tables.iter(batch_size=BATCH))
    empty = True
    for raw in _rows(batches, name):
        empty = False
        yield raw
    if empty:
        raise DataError(f"{name} holds no rows", name)


def text_columns(schema: Any, name: str, reading: Reading) -> list[str]:
    """The columns without bytes; the others are left out, and the notes say so.

    Raises DataError where a column that a layout reads holds bytes.
    """
    names: list[str] = [str(field.name) for field in schema]
    if len(set(names)) < len(names):
        raise DataError(f"{name} has two columns of one name", name, "Rename one: " + ", ".join(names))
    raw = [str(field.name) for field in schema if _has_bytes(field.type)]
    for column in raw:
        if reading.ours(column) in NAMES or column in reading.columns.values():
            raise DataError(f"the column {column} of {name} holds bytes, not text", name, "Save it as text.")
    if raw:
        them = "column " + raw[0] if len(raw) == 1 else "columns " + ", ".join(raw)
        reading.note(
            f"{name}: the {them} hold{'s' * (len(raw) == 1)} bytes, and {'is' if len(raw) == 1 else 'are'} left out"
        )
    return [column for column in names if column not in raw]


def _has_bytes(kind: Any) -> bool:
    from pyarrow import types

    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    if any(test(kind) for test in tests):
        return True
    inside = getattr(kind, "storage_type", None) or (kind.value_type if types.is_dictionary(kind) else None)
    if inside is not None:
        return _has_bytes(inside)
    return any(_has_bytes(kind.field(at).type) for at in range(kind.num_fields))


def _rows(batches: Iterable[Any], name: str) -> Iterator[Raw]:
    number = 0
    for batch in batches:
        for fields in batch.to_pylist():
            number += 1
            yield Raw({key: plain(value) for key, value in fields.items()}, name, number)


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: times, decimals and what else there is as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
