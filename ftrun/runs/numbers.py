"""Numbers as people read them, in the progress display, the tables and the report."""

from __future__ import annotations

import math
from typing import Any

LABELS = {"tokens_per_s": "tokens/s", "lr": "learning rate", "grad_norm": "gradient norm", "memory_bytes": "memory"}


def duration(seconds: float) -> str:
    """``0.4 s``, ``38 s``, ``3 min 12 s``, ``2 h 05 min``, ``3 d 4 h``."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(count: float) -> str:
    """Bytes in decimal units: ``2.41 GB``."""
    return _scaled(count, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), " B")


def quantity(count: float) -> str:
    """Tokens, parameters, rates: ``987``, ``12.4k``, ``135M``."""
    return _scaled(count, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)), "", space="")


def _scaled(count: float, units: tuple[tuple[str, float], ...], bare: str, space: str = " ") -> str:
    if not math.isfinite(count):
        return "?"
    for unit, scale in units:
        if abs(count) >= scale * 0.9995:
            return f"{_three_digits(count / scale)}{space}{unit}"
    return f"{_three_digits(count) if count != int(count) else int(count)}{bare}"


def _three_digits(value: float) -> str:
    whole = len(str(int(abs(value))))
    return f"{value:.{max(0, 3 - whole)}f}"


def plain(value: float) -> str:
    """A measured value in about four digits: ``0.4213``, ``31.07``, ``2.0e-04``, ``1,024``."""
    if value is None or not math.isfinite(value):
        return "NaN" if value is None or math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.1f}" if abs(value) < 1e6 else quantity(value)
    if abs(value) >= 10:
        return f"{value:.2f}"
    return f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.1e}"


def pair(value: float, stderr: float | None) -> tuple[str, str]:
    """A value and its standard error with as many decimals as the error carries two digits of."""
    if stderr is None or not math.isfinite(stderr) or stderr <= 0 or not math.isfinite(value):
        return plain(value), ""
    decimals = min(6, max(0, 1 - math.floor(math.log10(stderr))))
    return f"{value:,.{decimals}f}", f"{stderr:,.{decimals}f}"


def field(name: str, value: Any) -> str:
    """A named value of a training step as one short phrase of steady width: ``loss 1.2034``, ``140 tokens/s``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{label(name)} {value}"
    if name in ("memory", "memory_bytes"):
        return size(value)
    if name in ("tokens_per_s", "rows_per_s"):
        return f"{quantity(value)} {name.removesuffix('_per_s')}/s"
    if name in ("lr", "learning_rate"):
        return f"lr {value:.2e}"
    return f"{label(name)} {plain(value)}"


def label(name: str) -> str:
    """A key of the metrics as words."""
    return LABELS.get(name, name.replace("_", " "))
