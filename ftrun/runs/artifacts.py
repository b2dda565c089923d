"""The run folder and everything written into it: whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ftrun.errors import ConfigError, FtrunError, ResourceError
from ftrun.runs.state import process_start

MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR)


def write_json(path: Path, value: Any) -> None:
    """Strict JSON (NaN and infinity become null), written beside and renamed."""
    write_text(path, json.dumps(strict(value), indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    with disk_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with beside.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def whole_json(path: Path) -> bool:
    """Whether this file is there and can be read: a machine that lost power may have kept its name alone."""
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def strict(value: Any) -> Any:
    """Plain values with NaN and infinity as None, which strict JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


@contextlib.contextmanager
def disk_guard(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one clear line.

    Raises ResourceError when the disk is full, ConfigError when the folder cannot be written.
    """
    try:
        with full_disk_guard(path):
            yield
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise ConfigError(
                f"cannot write {path.name}: {error.strerror}",
                str(path.parent),
                "Choose a folder that you may write with out=DIR.",
            ) from error
        raise


@contextlib.contextmanager
def full_disk_guard(path: Path) -> Iterator[None]:
    """Turn a full disk into a ResourceError, in whatever words a library reports it."""
    try:
        yield
    except FtrunError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in FULL
        if full or "No space left" in str(error) or "os error 28" in str(error) or "File too large" in str(error):
            raise ResourceError(
                f"the disk is full while writing {path.name}",
                str(path.parent),
                "Free some space, or write elsewhere with out=DIR.",
            ) from error
        raise


@contextlib.contextmanager
def run_guard(folder: Path) -> Iterator[None]:
    """The same for all that a run writes below its folder, by whichever library; what it fails to read is not meant."""
    try:
        with full_disk_guard(folder / "metrics and log"):
            yield
    except FtrunError:
        raise
    except Exception as error:
        file = Path(os.path.abspath(getattr(error, "filename", None) or folder))
        refused = isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename
        refused = refused or any(f"(os error {number})" in str(error) for number in UNWRITABLE)  # as Rust says it
        if refused and file.is_relative_to(os.path.abspath(folder)):
            raise ConfigError(
                f"cannot write {file.name}: {getattr(error, 'strerror', None) or error}",
                str(file.parent if file != Path(os.path.abspath(folder)) else folder),
                "Choose a folder that you may write with out=DIR, or make this one writable and resume.",
            ) from error
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that appears complete or not at all: filled beside, a manifest of sizes and SHA-256 last, then renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with disk_guard(path):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            files = sorted(file for file in beside.rglob("*") if file.is_file())
            entries = {
                str(file.relative_to(beside)): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files
            }
            write_json(beside / MANIFEST, entries)
            if path.exists():
                shutil.rmtree(path)
            beside.replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def written_together(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder to write these files in, which are then moved to ``folder``; when writing one fails, none appears."""
    beside = folder / f".beside.{os.getpid()}"
    with disk_guard(folder):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            yield beside
            for name in names:
                (beside / name).replace(folder / name)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """True when every file of the manifest is there with its size and hash."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        return all(
            (folder / name).is_file()
            and (folder / name).stat().st_size == entry["bytes"]
            and sha256(folder / name) == entry["sha256"]
            for name, entry in entries.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # the manifest itself is damaged


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Short hash of plain values, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class RunLock:
    """Holds a run folder for one process: a second run with the same `out` is refused at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: TextIO | None = None

    def __enter__(self) -> RunLock:
        try:
            with full_disk_guard(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = (self.folder / ".lock").open("a+")
        except OSError as error:
            raise ConfigError(
                f"cannot write {self.folder}: {error.strerror}",
                f"out={self.folder}",
                "Choose a folder that you may write with out=DIR.",
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another run is writing to {self.folder}",
                f"out={self.folder}",
                "Wait for it, or choose another out=DIR.",
            ) from None
        self._sign()
        return self

    def _sign(self) -> None:
        """Write down who holds the folder: the process that takes signals for the run, which a launcher's worker is not."""
        assert self._file
        pid = os.getppid() if "LOCAL_RANK" in os.environ else os.getpid()
        signature = {"pid": pid, "host": socket.gethostname(), "started": process_start(pid)}
        with contextlib.suppress(OSError):  # a full disk ends the run where it saves something that matters
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps(signature))
            self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()


def new_run_folder(recipe: str | None, config: dict[str, Any]) -> Path:
    """runs/<recipe>/<time>-<hash of the config>, not yet made."""
    base = Path("runs") / (recipe or "none")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return base / f"{stamp}-{digest(config)[:8]}"


def cache_dir() -> Path:
    """Where converted models, tokenised data and stage outputs are kept between runs."""
    return Path(
        os.environ.get("FTRUN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ftrun"
    )
