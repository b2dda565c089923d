"""Loading the model that a run has left behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ftrun.stages.chain import LABELS
from ftrun.config.settings import Settings
from ftrun.runs.context import Context
from ftrun.data.render import apply_template
from ftrun.errors import ConfigError
from ftrun.models.bundle import Bundle
from ftrun.models.load import load_bundle
from ftrun.registry import build
from ftrun.training.distributed import Team
from ftrun.training.progress import Reporter


def load_trained(run: Path, settings: Settings, device: torch.device, full_precision: bool = False) -> Bundle:
    """The base model of a run with what it trained on top; ``full_precision`` leaves the run's quantisation out.

    Raises ConfigError when the run has saved no model.
    """
    if not (run / "adapter").is_dir() and not (run / "model").is_dir():
        ended = "It only selected: train with `ftrun train`, and give the folder of that run."
        if settings.stages != ["select"]:
            ended = "The run did not finish: continue it with resume=."
        raise ConfigError(f"{run} holds no trained model", f"run={run}", ended)
    quant = build("quant", "none") if full_precision else settings.component("quant")
    bundle = load_bundle(settings.model, task=settings.task, quant=quant, device=device, labels=label_count(run))
    if settings.task == "causal":
        apply_template(bundle.tokenizer, settings.model.template)
    bundle.model = settings.component("adapter").load(bundle.model, run)
    bundle.model.eval()
    return bundle


def label_count(run: Path) -> int | None:
    """Number of classes of a classification run."""
    file = run / LABELS
    return len(json.loads(file.read_text())) if file.exists() else None


def plain_context(settings: Settings, out: Path) -> Context:
    """A context for verbs that are not runs: one process, progress on the screen only."""
    settings.launch.processes = settings.launch.nodes = 1
    team = Team(settings.launch)
    return Context(settings, out, team, Reporter(rank=team.rank))
