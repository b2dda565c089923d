"""Which files a ``data.path`` means."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ftrun.data.raw import Reading
from ftrun.data.splits import files_of_split
from ftrun.errors import DataError, nearest

PACKED = (".gz", ".zst")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
METADATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "croissant.json"}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


def local_files(path: str, reading: Reading) -> list[Path] | None:
    """The files (and arrow folders) that a path names, sorted; None when it can only be a hub id.

    Of a folder with splits those of ``reading.split``. Raises DataError.
    """
    place = _place(path)
    if place.is_file():
        if not is_data_file(place):
            known = ", ".join(SUFFIXES)
            raise DataError(
                f"{place} has no known ending",
                str(place),
                f"Known: {known}; all but .parquet also with .gz or .zst.",
            )
        return [place]
    if place.is_dir():
        return _in_folder(place, reading)
    if any(mark in path for mark in "*?["):
        return _matching(place, path, reading)
    if HUB_ID.fullmatch(path) and not is_data_file(place):
        return None
    raise DataError(f'there is no file "{path}"', f"data.path={path}", near_file(place))


def _place(path: str) -> Path:
    """The path with its ~ resolved. Raises DataError for what no file system takes."""
    if not path.strip():
        raise DataError("data.path names nothing", 'data.path=""', "Name a file, or leave it out for the default.")
    try:
        place = Path(path).expanduser()
        place.stat()
    except FileNotFoundError:
        return place
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, ~ of an unknown user
        if isinstance(error, NotADirectoryError):
            return place
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"there is no file {path!r}: {reason}", "data.path") from error
    return place


def _matching(place: Path, path: str, reading: Reading) -> list[Path]:
    root = Path(place.anchor) if place.is_absolute() else Path()
    try:
        matches = sorted(root.glob(str(place.relative_to(place.anchor))))
    except (ValueError, NotImplementedError) as error:
        raise DataError(f'"{path}" is not a pattern of files: {error}', f"data.path={path}") from error
    files = [
        file
        for match in matches
        for file in (_in_folder(match, reading) if match.is_dir() else [match])
        if file.is_dir() or _holds_rows(file)
    ]
    if not files:
        raise DataError(
            f'no data file matches "{path}"', f"data.path={path}", "Quote the pattern, and check it with ls."
        )
    return files


def is_data_file(path: Path) -> bool:
    """Whether the ending says rows."""
    suffix, packed = suffix_of(path)
    return suffix in SUFFIXES and not (packed and suffix == ".parquet")


def suffix_of(path: Path) -> tuple[str, str]:
    """The ending that names the format, and the one that names the packing (or nothing)."""
    packed = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    return (Path(path.stem) if packed else path).suffix.lower(), packed


def _in_folder(folder: Path, reading: Reading) -> list[Path]:
    if _is_arrow(folder):
        return [folder]
    files = sorted(_walk(folder))
    if not files:
        raise DataError(
            f"the folder {folder} holds no data file",
            str(folder),
            f"Looked for {', '.join(SUFFIXES)}, and for what datasets.save_to_disk writes.",
        )
    return files_of_split(folder, files, reading)


def _walk(folder: Path) -> Iterator[Path]:
    """Files with rows and arrow folders, without what is hidden: tools keep their own records there."""
    for place, folders, names in os.walk(folder):
        here = Path(place)
        yield from (here / name for name in names if not name.startswith(".") and _holds_rows(here / name))
        arrow = {name for name in folders if _is_arrow(here / name)}
        yield from (here / name for name in arrow)
        folders[:] = [name for name in folders if name not in arrow and not name.startswith((".", "__"))]


def _is_arrow(folder: Path) -> bool:
    whole = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return whole or (folder / "dataset_dict.json").is_file()


def _holds_rows(file: Path) -> bool:
    return file.is_file() and is_data_file(file) and file.name not in METADATA


def near_file(place: Path) -> str:
    """A hint at what lies in the folder of a path that does not exist."""
    if not place.parent.is_dir():
        return f"There is no folder {place.parent} either."
    try:
        here = [file.name for file in place.parent.iterdir() if file.is_dir() or is_data_file(file)]
    except OSError as error:
        return f"{place.parent} cannot be read: {error.strerror}."
    return nearest(place.name, here) if here else f"{place.parent} holds no data file."
