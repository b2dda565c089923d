"""Rows of the kind that the model shall get better at: what targeted selection looks for in the pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ftrun.data.pool import Pool, load_pool
from ftrun.errors import ConfigError
from ftrun.runs.artifacts import cache_dir, digest

if TYPE_CHECKING:
    from ftrun.config.settings import Settings
    from ftrun.data.records import Record


@dataclass
class Queries:
    """Query rows, the files of ``select.queries`` one after the other; each file is a task."""

    pools: list[Pool]

    def __len__(self) -> int:
        return sum(map(len, self.pools))

    def __iter__(self) -> Iterator[Record]:
        return (record for pool in self.pools for record in pool)

    @cached_property
    def task(self) -> np.ndarray:
        """Task of every query, (queries,)."""
        return np.repeat(np.arange(len(self.pools)), [len(pool) for pool in self.pools])

    @property
    def fingerprint(self) -> str:
        return digest([pool.fingerprint for pool in self.pools])


def load_queries(settings: Settings) -> Queries:
    """Read the files that ``select.queries`` names, laid out as the pool is.

    Raises ConfigError when it names none, DataError for a bad file.
    """
    paths = settings.select.queries
    if not paths:
        name = settings.choice("select")
        raise ConfigError(
            f"select={name} looks for rows like your queries, and there are none",
            "select.queries=[]",
            "Name a file of rows of the kind wanted, one a task: select.queries=[dev.jsonl].",
        )
    return load_rows(settings, paths)


def load_rows(settings: Settings, paths: list[str]) -> Queries:
    """The rows of these files, laid out as the pool is. Raises DataError for a bad file."""
    folder: Path = cache_dir() / "data"
    data = replace(settings.data, limit=None, weights=None)
    return Queries([load_pool(replace(data, path=path), folder, settings.seed) for path in paths])
