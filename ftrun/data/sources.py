"""Raw rows, with the file and line they come from, out of whatever a user names as ``data.path``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ftrun.data.arrow_rows import read_arrow, read_parquet, rows_of_dataset
from ftrun.data.builtin import builtin_rows
from ftrun.data.csv_rows import read_csv
from ftrun.data.hub import refuse_without_hub
from ftrun.data.json_rows import read_json, read_jsonl
from ftrun.data.paths import local_files, near_file, suffix_of
from ftrun.data.raw import Raw, Reading
from ftrun.errors import DataError

READERS = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def read(path: str, reading: Reading | None = None) -> Iterator[Raw]:
    """Rows of a file, folder, glob, hub id or builtin:NAME[:ROWS], in order. Raises DataError."""
    reading = reading or Reading()
    if path.startswith("builtin:"):
        for number, fields in enumerate(builtin_rows(path), start=1):
            yield Raw(fields, path, number)
        return
    found = local_files(path, reading)
    if found is None:
        yield from _read_hub(path, reading)
        return
    for file in found:
        try:
            yield from read_arrow(file, reading) if file.is_dir() else read_file(file, reading)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}", str(file)) from error


def read_file(path: Path, reading: Reading) -> Iterator[Raw]:
    """Rows of one .json, .jsonl, .csv, .tsv or .parquet file, all but the last also packed. Raises DataError."""
    suffix, _ = suffix_of(path)
    empty = True
    for raw in READERS[suffix](path, reading):
        empty = False
        yield raw
    if empty:
        raise DataError(f"{path} holds no rows", str(path), "Give a file with at least one row.")


def _read_hub(path: str, reading: Reading) -> Iterator[Raw]:
    name, _, config = path.partition(":")
    refuse_without_hub(path, near_file(Path(path)))
    import datasets

    reading.splits = True
    try:
        data = datasets.load_dataset(name, config or None, split=reading.split)
    except Exception as error:  # whatever the hub's client raises, the user needs one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        todo = "Check the name, or give a local file."
        if reason.startswith("Config name is missing"):
            todo = f"Name one of them behind a colon: data.path={name}:NAME"
        raise DataError(
            f'"{path}" cannot be loaded from the hub: {reason}', f"data.path={path} data.split={reading.split}", todo
        ) from error
    yield from rows_of_dataset(data, path, reading)
