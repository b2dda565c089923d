"""``ftrun merge``: fold what was trained into plain weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftrun.config import keys
from ftrun.config.compose import Composed
from ftrun.config.saved import run_folder
from ftrun.errors import ConfigError
from ftrun.stages.trained import merge_run, plain_context


def merge(composed: Composed, overrides: Sequence[str]) -> dict[str, Any]:
    """Write ``out``, or model/ of the run: a folder that transformers loads without ftrun or peft."""
    settings = composed.settings
    run = run_folder(settings.run)
    target = Path(settings.out) if settings.out else run / "model"
    if settings.out and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not empty", f"out={target}", "Choose a folder that is not there yet.")
    if not settings.out and target.is_dir() and "model.dtype" in keys.named(overrides):
        raise ConfigError(
            f"{target} is there already", f"model.dtype={settings.model.dtype}", "Write another one with out=DIR."
        )
    dtype = settings.model.dtype if "model.dtype" in keys.named(overrides) else "auto"
    folder = merge_run(run, settings, plain_context(settings, run).team.device, target, dtype)
    print(folder)
    return {"model": str(folder), "out": str(folder)}
