"""The processor's cores that a run may use, and the threads that it takes."""

from __future__ import annotations

import os

OMP = "OMP_NUM_THREADS"


def usable_cores() -> int:
    """Cores that this process may use, which a scheduler or container may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_environment() -> int | None:
    """What OMP_NUM_THREADS asks for, for each process; None where it says nothing that can be used."""
    first = os.environ.get(OMP, "").partition(",")[0].strip()  # a list is for nested loops
    return int(first) if first.isdigit() and int(first) else None


def threads_per_process(asked: int | None, processes: int) -> int:
    """Threads of each of ``processes`` on this machine: as asked, as OMP_NUM_THREADS says, or a fair share of the cores."""
    return asked or threads_of_environment() or max(1, usable_cores() // processes)
