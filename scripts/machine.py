"""What a benchmark ran on, for its header, its table and its JSON: figures without that compare with nothing."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from ftrun.runs.cores import usable_cores
from ftrun.runs.lockfile import processor, version

DTYPE = "float32"  # of every model and array, on both sides
WIDE = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # instructions that decide which kernels a library takes


def facts(threads: int, dtype: str | None = DTYPE) -> dict[str, Any]:
    """Processor, its instructions, cores, threads and dtype; ``dtype`` None where nothing is computed."""
    return {
        "processor": processor(),
        "instructions": _instructions(),
        "cores": usable_cores(),
        "threads": threads,
        "dtype": dtype,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "trl": version("trl") if importlib.util.find_spec("trl") else None,
    }


def header(found: dict[str, Any]) -> str:
    """One line to print above a table."""
    threads = f"{found['threads']} thread{'s' * (found['threads'] != 1)} on {found['cores']} cores"
    instructions = ", ".join(found["instructions"]) or "instructions unknown"
    return f"{found['processor']} ({instructions}); {found['dtype'] or 'no numbers'}; {threads}; torch {found['torch']}"


def _instructions() -> list[str]:
    file = Path("/proc/cpuinfo")
    flags = (
        next((line for line in file.read_text().splitlines() if line.startswith("flags")), "") if file.is_file() else ""
    )
    return [name for name in WIDE if name in flags.split()]


def pinned(threads: int) -> dict[str, str]:
    """The environment of a process that takes so many threads, in every library."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return os.environ | dict.fromkeys(names, str(threads))
