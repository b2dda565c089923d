"""Data sets that need no file and no network: one module a source, found on disk, its name is the source's name.

A source has ``rows(count: int | None) -> Iterator[dict]`` and, where answers can be checked, ``verify(text, row) -> float``.
One that holds several problems takes what follows the slash of ``builtin:NAME/PROBLEM`` as ``rows(count, problem)``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ftrun.errors import ConfigError, nearest


def names() -> list[str]:
    """Names of all built-in sources."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem != "__init__")


def builtin(name: str) -> ModuleType:
    """The module of one source; an unknown name is a ConfigError that offers the nearest."""
    if name not in names():
        raise ConfigError(f'there is no built-in data set "{name}"', f"builtin:{name}", nearest(name, names()))
    return importlib.import_module(f"ftrun.data.builtin.{name}")


def builtin_rows(path: str) -> Iterator[dict[str, Any]]:
    """Rows of ``builtin:NAME`` or ``builtin:NAME/PROBLEM``, and how many after a colon."""
    _, name, *rest = path.split(":")
    name, slash, problem = name.partition("/")
    if len(rest) > 1 or (rest and not (rest[0].isascii() and rest[0].isdigit() and int(rest[0]) > 0)):
        raise ConfigError(
            f'"{path}" is not builtin:NAME or builtin:NAME:ROWS', f"data.path={path}", "ROWS is a whole number above 0."
        )
    source, count = builtin(name), int(rest[0]) if rest else None
    several = "problem" in inspect.signature(source.rows).parameters
    if several != bool(slash):
        todo = f"Name one, as in builtin:{name}/PROBLEM:ROWS." if several else f"Write builtin:{name}."
        raise ConfigError(f"{name} holds {'several problems' if several else 'one kind of rows'}", path, todo)
    yield from source.rows(count, problem) if several else source.rows(count)
