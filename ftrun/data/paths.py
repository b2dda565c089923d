"""Which files a ``data.path`` means."""

from __future__ import annotations

import re
from pathlib import Path

from ftrun.errors import DataError, nearest

PACKED = (".gz", ".zst")
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


def local_files(path: str) -> list[Path] | None:
    """The files (and arrow folders) that a path names, sorted; None when it can only be a hub id."""
    place = Path(path).expanduser()
    if place.is_file():
        if not is_data_file(place):
            known = ", ".join(SUFFIXES)
            raise DataError(
                f"{place} has no known ending",
                str(place),
                f"Known: {known}; .json, .jsonl and .csv also with .gz or .zst.",
            )
        return [place]
    if place.is_dir():
        return _in_folder(place)
    if any(mark in path for mark in "*?["):
        root = Path(place.anchor) if place.is_absolute() else Path()
        matches = sorted(root.glob(str(place.relative_to(place.anchor))))
        files = [
            file
            for match in matches
            for file in (_in_folder(match) if match.is_dir() else [match])
            if file.is_dir() or is_data_file(file)
        ]
        if not files:
            raise DataError(
                f'no data file matches "{path}"', f"data.path={path}", "Quote the pattern, and check it with ls."
            )
        return files
    if HUB_ID.fullmatch(path) and not is_data_file(place):
        return None
    raise DataError(f'there is no file "{path}"', f"data.path={path}", near_file(place))


def is_data_file(path: Path) -> bool:
    """Whether the ending says rows."""
    suffix, packed = suffix_of(path)
    return suffix in SUFFIXES and not (packed and suffix == ".parquet")


def suffix_of(path: Path) -> tuple[str, str]:
    """The ending that names the format, and the one that names the packing (or nothing)."""
    packed = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    return (Path(path.stem) if packed else path).suffix.lower(), packed


def _in_folder(folder: Path) -> list[Path]:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return [folder]
    files = sorted(file for file in folder.rglob("*") if file.is_file() and is_data_file(file))
    if not files:
        raise DataError(
            f"the folder {folder} holds no data file",
            str(folder),
            f"Looked for {', '.join(SUFFIXES)}, and for what datasets.save_to_disk writes.",
        )
    return files


def near_file(place: Path) -> str:
    """A hint at what lies in the folder of a path that does not exist."""
    if not place.parent.is_dir():
        return f"There is no folder {place.parent} either."
    here = [file.name for file in place.parent.iterdir() if file.is_dir() or is_data_file(file)]
    return nearest(place.name, here) if here else f"{place.parent} holds no data file."
