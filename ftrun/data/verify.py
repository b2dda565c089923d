"""Checking generated answers with the verifier that a built-in source brings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftrun.data.builtin import builtin, names
from ftrun.errors import ConfigError, nearest

Verifier = Callable[[str, dict[str, Any]], float]


def verifier(name: str) -> Verifier:
    """``verify(text, row) -> float`` (1.0 right, 0.0 wrong) of a built-in source; ConfigError if it has none."""
    verify = getattr(builtin(name), "verify", None)
    if verify is None:
        able = [other for other in names() if hasattr(builtin(other), "verify")]
        raise ConfigError(
            f'the built-in data set "{name}" cannot check answers', f"verifier={name}", nearest(name, able)
        )
    return verify
