"""What identifies a model: a hash of its weights and of everything that decides how text becomes tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ftrun.models.filehashes import FileHashes
from ftrun.models.source import tokenizer_files, weight_files


def folder_fingerprint(folder: Path) -> str:
    """First 16 hex digits of the SHA-256 over weights, config, tokenizer and template; independent of where they lie."""
    digest = hashlib.sha256()
    known = FileHashes()
    own_code = sorted(folder.glob("*.py"))  # run where model.trust_remote_code allows it
    for file in [*weight_files(folder), *tokenizer_files(folder), *own_code]:
        digest.update(f"{file.name} {known.sha256(file)}\n".encode())
    known.save()
    return digest.hexdigest()[:16]
