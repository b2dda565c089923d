"""Hashes of files by real path, size and time of change, kept in the cache: hashing gigabytes takes a while."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ftrun.runs.artifacts import MANIFEST, cache_dir, digest, sha256


class FileHashes:
    """What is known of files; what is not is computed. `save` keeps it for the next process."""

    def __init__(self) -> None:
        self.file = cache_dir() / "file-hashes.json"
        self.new: dict[str, str] = {}
        self.hashes = self._read()

    def sha256(self, file: Path) -> str:
        facts = file.stat()
        key = f"{file.resolve()}:{facts.st_size}:{facts.st_mtime_ns}"
        if key not in self.hashes:
            self.hashes[key] = self.new[key] = sha256(file)
        return self.hashes[key]

    def save(self) -> None:
        if not self.new:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        known = self._read() | self.new
        beside.write_text(json.dumps({"digest": digest(known), "known": known}))
        beside.replace(self.file)

    def _read(self) -> dict[str, str]:
        """Nothing where the file is not there or damaged: only a cache, what it does not know is computed again."""
        try:
            said = json.loads(self.file.read_text())
            return said["known"] if said["digest"] == digest(said["known"]) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def unchanged(folder: Path) -> bool:
    """Whether all files of the folder's manifest are as they were written; those that have not been touched are not read."""
    known = FileHashes()
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        same = all(known.sha256(folder / name) == entry["sha256"] for name, entry in entries.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    known.save()
    return same
