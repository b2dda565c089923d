"""Which files of a folder belong to the asked-for split: by its README's ``configs``, else by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ftrun.data.raw import Reading
from ftrun.errors import DataError

ALIASES = {  # what people write -> the split
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
SHARD = re.compile(r"([\w.-]+?)-\d{5}-of-\d{5}(\.|$)")
FRONT_MATTER = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


def files_of_split(folder: Path, files: list[Path], reading: Reading) -> list[Path]:
    """The files of ``reading.split``; all of them where the folder has no splits. Raises DataError."""
    by_split = _by_readme(folder, files) or _by_name(folder, files)
    if not by_split:
        return files
    return by_split[choose(by_split, reading, str(folder))]


def choose(splits: Iterable[str], reading: Reading, source: str) -> str:
    """The one of ``splits`` that is asked for, under the name or another usual one of it. Raises DataError."""
    splits = list(splits)
    asked = reading.split
    found = [asked] if asked in splits else [name for name in splits if _canonical(name) == _canonical(asked)]
    if len(found) != 1:
        there = ", ".join(splits)
        what = f'more than one split "{asked}"' if found else f'no split "{asked}"'
        raise DataError(f"{source} has {what}; it has {there}", f"data.split={asked}", "Choose one with data.split.")
    reading.splits = True
    if len(splits) > 1:
        reading.note(f"{source}: the split {found[0]} is read, of {', '.join(splits)}")
    return found[0]


def _canonical(name: str) -> str:
    return ALIASES.get(name.lower(), name)


def _by_name(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    by_split: dict[str, list[Path]] = {}
    others: list[Path] = []
    for file in files:
        name = split_of(file.relative_to(folder))
        (by_split.setdefault(name, []) if name else others).append(file)
    if len(by_split) == 1 and not by_split.keys() & ALIASES.keys():
        return {}  # part-00000-of-00008: the shards of one data set
    if by_split and others:
        named = ", ".join(str(file.relative_to(folder)) for file in others[:5])
        raise DataError(
            f"{folder} holds files of the split{'s' * (len(by_split) > 1)} {', '.join(by_split)}, and files of none",
            named,
            f"Say which to read: data.path='{folder}/{files[0].relative_to(folder)}', a pattern, or a list of files.",
        )
    return by_split


def split_of(file: Path) -> str | None:
    """The split that a path inside a data set's folder names: of a shard, of a sub-folder, or in the file's name."""
    if shard := SHARD.match(file.name):
        return shard[1]
    for part in reversed(file.parts[:-1]):
        if part.lower() in ALIASES:
            return part
    words = [word for word in re.split(r"[-._ \d]+", file.name) if word.lower() in ALIASES]
    return words[0] if len(words) == 1 else None


# ---- the README of a data set ----


def _by_readme(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    readme = folder / "README.md"
    config = _config(readme)
    if config is None:
        return {}
    by_split: dict[str, list[Path]] = {}
    base = folder / str(config.get("data_dir") or "")
    for split, patterns in _patterns(config["data_files"], readme):
        wanted = by_split.setdefault(split, [])
        for pattern in patterns:
            if pattern.startswith("/") or ".." in Path(pattern).parts or "://" in pattern:
                raise DataError(f"the configs of {readme} name a file outside of the folder: {pattern}", str(readme))
            matches = set(base.glob(pattern))
            found = [file for file in files if file in matches or matches & set(file.parents)]
            if not found:
                raise DataError(
                    f"no data file here matches {pattern}, which the configs of {readme} name",
                    f"{readme}: split {split}",
                    f"Complete the folder, or name files: data.path='{folder}/NAME'.",
                )
            wanted += [file for file in found if file not in wanted]
    return by_split


def _config(readme: Path) -> dict[str, Any] | None:
    """The one config with data_files in the README's front matter, or its default one. Raises DataError."""
    import yaml

    if not readme.is_file():
        return None
    matter = FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
    if not matter or not re.search(r"^configs\s*:", matter[1], re.MULTILINE):
        return None
    try:
        configs = yaml.safe_load(matter[1])["configs"]
    except (yaml.YAMLError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise DataError(f"the configs of {readme} cannot be read", str(readme), "Repair or remove them.") from error
    configs = [one for one in configs or [] if isinstance(one, dict) and one.get("data_files")]
    default = [one for one in configs if one.get("default") is True or one.get("config_name") == "default"]
    if len(configs) > 1 and len(default) != 1:
        names = ", ".join(str(one.get("config_name")) for one in configs)
        raise DataError(
            f"{readme.parent} holds several data sets: {names}",
            f"{readme}: configs",
            f"Name the files of one: data.path='{readme.parent}/NAME'.",
        )
    return (default or configs or [None])[0]


def _patterns(data_files: Any, readme: Path) -> list[tuple[str, list[str]]]:
    """Splits with their patterns, of the ways in which data_files may be written."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    entries = data_files if isinstance(data_files, list) else [data_files]
    found: list[tuple[str, list[str]]] = []
    for entry in entries:
        split, path = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        paths: list[Any] = path if isinstance(path, list) else [path]
        if not isinstance(split, str) or not paths or not all(isinstance(one, str) and one for one in paths):
            raise DataError(f"the data_files of {readme} name no split with its files", str(readme), "Repair them.")
        found.append((split, paths))
    return found
