"""Where a text of the command line or of a recipe points to on this machine."""

from __future__ import annotations

from pathlib import Path

from ftrun.errors import ConfigError


def place(text: str | Path, key: str) -> Path:
    """The path that ``key`` names, its ~ resolved; there need be nothing.

    Raises ConfigError for what no file system takes: too long, ~ of nobody, a loop of links, a folder that is closed.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{key} names no place that can be read: {reason}", f"{key}={text}", "Check it.") from None
    return path
