"""What identifies a model: a hash of its weights and of everything that decides how text becomes tokens."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ftrun.models.source import tokenizer_files, weight_files
from ftrun.runs.artifacts import cache_dir


def folder_fingerprint(folder: Path) -> str:
    """First 16 hex digits of the SHA-256 over weights, config, tokenizer and template; independent of where they lie."""
    digest = hashlib.sha256()
    known = _Known()
    own_code = sorted(folder.glob("*.py"))  # run where model.trust_remote_code allows it
    for file in [*weight_files(folder), *tokenizer_files(folder), *own_code]:
        digest.update(f"{file.name} {known.sha256(file)}\n".encode())
    known.save()
    return digest.hexdigest()[:16]


class _Known:
    """Hashes of files by real path, size and time of change, kept in the cache: hashing gigabytes takes a while."""

    def __init__(self) -> None:
        self.file = cache_dir() / "file-hashes.json"
        self.new: dict[str, str] = {}
        self.hashes = self._read()

    def sha256(self, file: Path) -> str:
        facts = file.stat()
        key = f"{file.resolve()}:{facts.st_size}:{facts.st_mtime_ns}"
        if key not in self.hashes:
            with file.open("rb") as stream:
                self.hashes[key] = self.new[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self.hashes[key]

    def save(self) -> None:
        if not self.new:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        beside.write_text(json.dumps(self._read() | self.new))
        beside.replace(self.file)

    def _read(self) -> dict[str, str]:
        try:
            return json.loads(self.file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}  # only a cache: what is not there is computed again
