"""How much memory a process uses, and what to say when there was not enough."""

from __future__ import annotations

import contextlib
import errno
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ftrun.errors import FtrunError, ResourceError


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


def available_bytes(device: torch.device) -> float:
    """Memory that this process may still take on ``device``; infinity where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(_system_memory(), _cgroup_memory())


def _system_memory() -> float:
    file = Path("/proc/meminfo")
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith("MemAvailable"):
            return float(line.split()[1]) * 1024
    return float("inf")


def _cgroup_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """What the limits of this container or batch job, and of all groups around it, still leave (cgroup v2)."""
    paths = (
        [line[3:].strip() for line in own.read_text().splitlines() if line.startswith("0::")] if own.exists() else []
    )
    left = float("inf")
    for path in paths:
        group = root / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            limit, used = folder / "memory.max", folder / "memory.current"
            if limit.exists() and used.exists() and limit.read_text().strip() != "max":
                left = min(left, int(limit.read_text()) - int(used.read_text()) + _file_cache(folder / "memory.stat"))
    return max(left, 0.0)


def _file_cache(stat: Path) -> int:
    """Bytes of files that the group would give up when it needs them."""
    lines = stat.read_text().splitlines() if stat.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


@contextlib.contextmanager
def memory_guard(doing: str, todo: str) -> Iterator[None]:
    """Turn a failed allocation of torch, numpy or the system, on GPU or CPU, into a ResourceError."""
    try:
        yield
    except FtrunError:
        raise
    except Exception as error:
        text = str(error)
        failed = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text
        if failed or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            raise ResourceError(f"not enough memory while {doing}", _asked_for(text), todo) from error
        raise


def _asked_for(text: str) -> str:
    """How much an allocator was asked for, from its message."""
    found = re.search(r"tried to allocate ([\d.]+ ?[KMGT]?i?B(?:ytes)?|\d+ bytes)", text, re.IGNORECASE)
    if not found:
        return text.splitlines()[0] if text else ""
    amount = found[1]
    if amount.endswith("bytes"):
        amount = f"{int(amount.split()[0]) / 2**30:.2f} GiB"
    return f"{amount} more were asked for"
