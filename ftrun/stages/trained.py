"""Loading the model that a run has left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ftrun.config.saved import load_settings
from ftrun.config.settings import Settings
from ftrun.data.render import apply_template
from ftrun.errors import ConfigError
from ftrun.models.bundle import Bundle
from ftrun.models.load import load_bundle, resolve_dtype
from ftrun.models.precision import mix
from ftrun.models.quiet import without_bars
from ftrun.registry import build
from ftrun.runs.artifacts import whole_folder
from ftrun.runs.progress import Reporter
from ftrun.stages.rows import LABELS
from ftrun.training.context import Context
from ftrun.training.distributed import Team


def load_trained(run: Path, settings: Settings, device: torch.device, full_precision: bool = False) -> Bundle:
    """The base model of a run with what it trained on top; ``full_precision`` leaves the run's quantisation out.

    Raises ConfigError when the run has saved no model.
    """
    check_trained(run)
    quant = build("quant", "none") if full_precision else settings.component("quant")
    bundle = load_bundle(
        settings.model, task=settings.task, quant=quant, device=device, labels=len(labels_of(run)) or None
    )
    if settings.task == "causal":
        apply_template(bundle.tokenizer, settings.model.template)
    bundle.model = settings.component("adapter").load(bundle.model, run)
    bundle.model.eval()
    mix(bundle)
    return bundle


def check_trained(run: Path) -> None:
    """Raise ConfigError when the run has saved no model."""
    if (run / "adapter").is_dir() or (run / "model").is_dir():
        return
    ended = f"The run did not finish: continue it with ftrun train resume={run}."
    if load_settings(run)[1].stages == ["select"]:
        ended = "It only selected: train with `ftrun train`, and give the folder of that run."
    raise ConfigError(f"{run} holds no trained model", f"run={run}", ended)


def labels_of(run: Path) -> list[Any]:
    """Class names of a classification run; none of any other."""
    file = run / LABELS
    return json.loads(file.read_text()) if file.exists() else []


def plain_context(settings: Settings, out: Path) -> Context:
    """A context for verbs that are not runs: one process, progress on the screen only."""
    settings.launch.processes = settings.launch.nodes = 1
    team = Team(settings.launch)
    return Context(settings, out, team, Reporter(rank=team.rank))


def merge_run(
    run: Path, settings: Settings, device: torch.device, target: Path | None = None, dtype: str = "auto"
) -> Path:
    """Merge into the full-precision base, for merging into 4 bits would round what was learnt; model/ that is there stays.

    ``target``: where to write instead of model/ of the run. ``dtype``: of the weights that are written, where somebody
    asks for one; what was trained would lose small changes in bfloat16.
    """
    target = target or run / "model"
    if target == run / "model" and target.is_dir():
        return target
    if not settings.train.pure_bfloat16:  # a sum in bfloat16 would round small changes away
        settings = replace(settings, model=replace(settings.model, dtype="float32"))
    bundle = load_trained(run, settings, device, full_precision=True)
    merged: Any = settings.component("adapter").merge(bundle.model)
    if dtype != "auto":
        merged = merged.to(resolve_dtype(dtype, device))
    with whole_folder(target) as folder:
        with without_bars():
            merged.save_pretrained(folder)
        bundle.tokenizer.save_pretrained(folder)
    return target
