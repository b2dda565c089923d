"""Rows on disk with an index of fixed-size entries, so that a pool larger than memory is read like a list."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ftrun.data.raw import Raw
from ftrun.data.records import Message, Record
from ftrun.errors import DataError
from ftrun.runs.artifacts import disk_guard

ENTRY = np.dtype(
    [
        ("store", "<i4"),  # file that holds the row: 0 is the spool, others are the user's own jsonl files
        ("start", "<i8"),  # first byte
        ("length", "<i8"),  # bytes
        ("source", "<i4"),  # entry of data.path
        ("file", "<i4"),  # file that the row was read from
        ("line", "<i8"),
        ("named", "<i4"),  # what its field "source" says; -1: nothing
        ("content", "<u8"),  # hash of what is trained
        ("row", "<u8"),  # hash of all fields
    ]
)
BUFFERED = 4096  # entries


class Spool:
    """Writes rows and their index into nameless files of a folder; plain jsonl files are only indexed where they lie.

    Nameless, so that runs which share the folder never meet, and nothing stays behind.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: list[str] = []
        self.names: list[str] = []  # that fields "source" hold
        self._file_numbers: dict[str, int] = {}
        self._name_numbers: dict[str, int] = {}
        self._stores: list[Path] = []
        self._store_numbers: dict[str, int] = {}
        self._entries = np.zeros(BUFFERED, ENTRY)
        self._filled = self._position = 0
        with disk_guard(folder / "rows"):
            folder.mkdir(parents=True, exist_ok=True)
            self._rows: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the pool
            self._index: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def add(self, raw: Raw, source: int, record: Record | None) -> None:
        """Write a row down; without a record only its number is taken."""
        store, start, length = self._place(raw) if record else (0, 0, 0)
        if raw.file not in self._file_numbers:
            self._file_numbers[raw.file] = len(self.files)
            self.files.append(raw.file)
        file = self._file_numbers[raw.file]
        hashes = (content_hash(record), row_hash(raw.fields)) if record else (0, 0)
        named = self._named(raw.fields.get("source")) if record else -1
        self._entries[self._filled] = (store, start, length, source, file, raw.line, named, *hashes)
        self._filled += 1
        if self._filled == BUFFERED:
            self._flush()

    def close(self) -> tuple[np.ndarray, Stores]:
        """The finished index, memory-mapped, and the files that it points into."""
        self._flush()
        with disk_guard(self.folder / "rows"):
            self._rows.flush()
            self._index.flush()
        size = self._index.tell()
        index = np.memmap(self._index, ENTRY, "r") if size else np.zeros(0, ENTRY)  # type: ignore[call-overload]
        self._index.close()  # the map stays
        return index, Stores(self._rows, self._stores)

    def abandon(self) -> None:
        """Remove what was written so far."""
        self._rows.close()
        self._index.close()

    def _named(self, said: Any) -> int:
        if not isinstance(said, str) or not said:
            return -1
        number = self._name_numbers.setdefault(said, len(self.names))
        if number == len(self.names):
            self.names.append(said)
        return number

    def _place(self, raw: Raw) -> tuple[int, int, int]:
        if raw.start >= 0:
            if raw.file not in self._store_numbers:
                self._stores.append(Path(raw.file).absolute())
                self._store_numbers[raw.file] = len(self._stores)
            return self._store_numbers[raw.file], raw.start, raw.length
        line = json.dumps(raw.fields).encode() + b"\n"
        with disk_guard(self.folder / "rows"):
            self._rows.write(line)
        start = self._position
        self._position += len(line)
        return 0, start, len(line)

    def _flush(self) -> None:
        with disk_guard(self.folder / "rows"):
            self._index.write(self._entries[: self._filled].tobytes())
        self._filled = 0


class Stores:
    """The files that hold rows: 0 is the spool, others are the user's, opened when first read and refused if changed."""

    def __init__(self, spool: BinaryIO, paths: list[Path]):
        self._paths = paths
        self._stamps = [_stamp(path) for path in paths]
        self._open: dict[int, BinaryIO] = {0: spool}

    def fields(self, store: int, start: int, length: int) -> dict[str, Any]:
        if store not in self._open:
            path = self._paths[store - 1]
            if _stamp(path) != self._stamps[store - 1]:
                raise DataError(f"{path} has changed since its rows were counted", str(path), "Start again.")
            self._open[store] = path.open("rb", buffering=0)
        line = os.pread(self._open[store].fileno(), length, start)  # positioned: forked processes share the file
        return json.loads(line.decode("utf-8-sig" if start == 0 else "utf-8"))


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def content_hash(record: Record) -> int:
    """64-bit hash of what a row says, whatever its layout, file, position and further columns."""
    turns = [[_said(turn) for turn in part] for part in (record.messages, record.chosen, record.rejected)]
    tools = [record.tools] if record.tools else []
    return _hash64([record.kind, *turns, record.text, record.text_pair, record.label, *tools])


def _said(turn: Message) -> list[Any]:
    """Role and content, and what else the turn has: most have nothing, and their hashes are as they always were."""
    weight = None if turn.weight == 1 else turn.weight
    further = {"weight": weight, "thought": turn.thought, "calls": turn.calls, "of": turn.name, "to": turn.call_id}
    told = {key: value for key, value in further.items() if value not in (None, "", ())}
    return [turn.role, turn.content, told] if told else [turn.role, turn.content]


def row_hash(fields: dict[str, Any]) -> int:
    """64-bit hash of all fields that are not null."""
    return _hash64({key: value for key, value in fields.items() if value is not None})


def _hash64(value: Any) -> int:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return int.from_bytes(hashlib.blake2b(canonical, digest_size=8).digest(), "little")
