"""What was made once, kept under a key of all that it depends on: settings, data, model, code, libraries and device."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.runs import code
from ftrun.runs.artifacts import MANIFEST, cache_dir, digest, is_whole, whole_folder, write_json, written_together

KEY = "key.json"  # the sections of a key, beside what is kept under it: two of them compared say what has changed


@dataclass(frozen=True)
class Key:
    """What something is kept under; ``sections`` can be read, ``digest`` names the folder."""

    stage: str
    sections: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return digest(self.sections)

    def write(self, folder: Path) -> None:
        """Put the sections beside what was made, for people."""
        write_json(folder / KEY, self.sections)

    @property
    def folder(self) -> Path:
        return cache_dir() / "stages" / f"{self.stage}-{self.digest}"


def key_of(
    stage: str,
    what: Mapping[str, Any],
    *,
    modules: Iterable[str],
    chosen: Mapping[str, Iterable[str]] | None = None,
    libraries: Iterable[str] = code.LIBRARIES,
) -> Key:
    """The key of a result that ``modules`` compute from ``what``: resolved settings and hashes of the inputs.

    ``chosen``: components by slot, as `code.sources` takes them. Where a model computes, ``what`` holds its dtype and
    the kind of device as they were resolved, never as they were asked for.
    """
    made_by = {"code": code.sources(modules, chosen), "libraries": code.versions(libraries)}
    return Key(stage, {**what, **made_by})


def fetch(key: Key, target: Path) -> bool:
    """Copy a kept output into ``target``; False when there is none, or when it is damaged."""
    kept = key.folder
    if not is_whole(kept):
        return False
    with written_together(target, [file.name for file in kept.iterdir() if file.name not in (MANIFEST, KEY)]) as beside:
        shutil.copytree(kept, beside, dirs_exist_ok=True)
    return True


def keep(key: Key, files: list[Path]) -> None:
    """Keep these files for the next run with the same key."""
    with whole_folder(key.folder) as folder:
        for file in files:
            shutil.copy2(file, folder / file.name)
        key.write(folder)
