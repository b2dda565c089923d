"""The shipped recipes as they compose, each composed once a test worker: Hydra takes a third of a second for one."""

from __future__ import annotations

import functools

from ftrun.config import compose
from ftrun.config.compose import Composed


@functools.cache
def as_shipped(name: str) -> Composed:
    """The config of ``recipe=NAME`` alone; to be read, not changed."""
    return compose.load([f"recipe={name}"])
