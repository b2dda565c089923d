"""lock.json: everything that a run depended on, so that it can be run again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

from ftrun import registry

PACKAGES = (
    "ftrun",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "peft",
    "bitsandbytes",
    "hydra-core",
    "omegaconf",
    "numpy",
    "safetensors",
)


def describe(command: Sequence[str], seed: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Command, versions, git state, hardware, seed, and the fingerprints collected during the run."""
    return {
        "command": list(command),
        "seed": seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "git": git_state(),
        "hardware": {"platform": platform.platform(), "processor": processor(), "cores": len(os.sched_getaffinity(0))},
        "fingerprints": facts,
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that ftrun runs from and whether it was changed; None for an installed package."""
    root = registry.PACKAGE.parent
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    return {"commit": commit, "changed": bool(_git(root, "status", "--porcelain"))} if commit else None


def _git(root: Any, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
