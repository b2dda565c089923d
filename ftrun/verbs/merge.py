"""``ftrun merge``: fold what was trained into plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ftrun.runs.artifacts import whole_folder
from ftrun.config.compose import Composed
from ftrun.config.saved import load_settings
from ftrun.config.settings import Settings
from ftrun.models.quiet import without_bars
from ftrun.runs.trained import load_trained, plain_context


def merge(composed: Composed) -> dict[str, Any]:
    """Write ``model/`` of a run: a folder that transformers loads without ftrun or peft."""
    run, settings = load_settings(composed.settings.run)
    settings.launch = composed.settings.launch
    folder = merge_run(run, settings, plain_context(settings, run).team.device)
    print(folder)
    return {"model": str(folder)}


def merge_run(run: Path, settings: Settings, device: torch.device) -> Path:
    """Merge into the full-precision base: merging into 4 bits would round what was learnt."""
    if (run / "model").is_dir():
        return run / "model"
    bundle = load_trained(run, settings, device, full_precision=True)
    merged: Any = settings.component("adapter").merge(bundle.model)
    with whole_folder(run / "model") as folder:
        with without_bars():
            merged.save_pretrained(folder)
        bundle.tokenizer.save_pretrained(folder)
    return run / "model"
