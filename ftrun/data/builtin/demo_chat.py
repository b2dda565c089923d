"""Some three hundred varied instructions with answers, written for ftrun: enough to see every stage at work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftrun.errors import ConfigError

FILE = Path(__file__).with_suffix(".jsonl")


def rows(count: int | None = None) -> Iterator[dict[str, Any]]:
    """The first ``count`` rows in alpaca layout, or all."""
    lines = FILE.read_text(encoding="utf-8").split("\n")[:-1]
    if count is not None and count > len(lines):
        raise ConfigError(
            f"demo_chat has {len(lines)} rows, {count} were asked for",
            f"builtin:demo_chat:{count}",
            "Ask for fewer, or leave the number out.",
        )
    for line in lines[:count]:
        yield json.loads(line)
