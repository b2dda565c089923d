"""Outputs of a stage, kept under a key of everything that they depend on: settings, data, model and code."""

from __future__ import annotations

import shutil
from pathlib import Path

from ftrun.runs.artifacts import MANIFEST, is_whole, whole_folder, written_together
from ftrun.runs.artifacts import cache_dir


def fetch(stage: str, key: str, target: Path) -> bool:
    """Copy a kept output into ``target``; False when there is none, or when it is damaged."""
    kept = cache_dir() / "stages" / f"{stage}-{key}"
    if not is_whole(kept):
        return False
    with written_together(target, [file.name for file in kept.iterdir() if file.name != MANIFEST]) as beside:
        shutil.copytree(kept, beside, dirs_exist_ok=True)
    return True


def keep(stage: str, key: str, files: list[Path]) -> None:
    """Keep these files for the next run with the same key."""
    with whole_folder(cache_dir() / "stages" / f"{stage}-{key}") as folder:
        for file in files:
            shutil.copy2(file, folder / file.name)
