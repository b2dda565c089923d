"""How much memory a process uses, and what to say when there was not enough."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ftrun.errors import ResourceError


def peak_bytes() -> int:
    """The most memory that this process has held: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_bytes() -> int:
    """Memory that this process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return peak_bytes()


@contextlib.contextmanager
def memory_guard(doing: str, todo: str) -> Iterator[None]:
    """Turn an allocation failure of torch, on GPU or CPU, into a ResourceError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text or "alloc_cpu" in text:
            raise ResourceError(f"not enough memory while {doing}", text.splitlines()[0] if text else "", todo) from error
        raise
