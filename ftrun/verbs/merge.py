"""``ftrun merge``: fold what was trained into plain weights."""

from __future__ import annotations

from typing import Any

from ftrun.config.compose import Composed
from ftrun.config.saved import load_settings
from ftrun.stages.trained import merge_run, plain_context


def merge(composed: Composed) -> dict[str, Any]:
    """Write ``model/`` of a run: a folder that transformers loads without ftrun or peft."""
    run, settings = load_settings(composed.settings.run)
    settings.launch = composed.settings.launch
    folder = merge_run(run, settings, plain_context(settings, run).team.device)
    print(folder)
    return {"model": str(folder)}
