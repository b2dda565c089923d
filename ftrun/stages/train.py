"""The third stage: run the loop, from the newest whole checkpoint where there is one, and save what was trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ftrun.adapters.base import Adapter
from ftrun.data.tokens import TokenTable
from ftrun.errors import CheckpointError
from ftrun.stages.attach import free_memory
from ftrun.stages.trained import merge_run
from ftrun.training import checkpoint, estimate
from ftrun.training.context import Context
from ftrun.training.loop import Trainer
from ftrun.training.signals import StopSignals


def newest_checkpoint(ctx: Context) -> Path | None:
    """Where a resumed run goes on from. Raises CheckpointError when there are checkpoints and none is whole."""
    if not ctx.settings.resume:
        return None
    folder = ctx.out / "train" / "checkpoints"
    if ctx.team.is_main:
        checkpoint.sweep(folder)
    path, damaged = checkpoint.newest_whole(folder)
    for torn in damaged:
        ctx.report.warn(f"{torn.name} is damaged or incomplete: passed over")
    if damaged and path is None:
        raise CheckpointError("no checkpoint is whole", str(folder), "Start a new run.")
    return path


def train(trainer: Trainer, ctx: Context, signals: StopSignals, path: Path | None, counts: dict[str, int]) -> None:
    """Train to the end and save; ``counts``: parameters of the model, ``total`` and ``trainable``."""
    settings = ctx.settings
    _warn_of_large_steps(trainer, ctx, counts["trainable"])
    steps = trainer.plan.steps
    share = counts["trainable"] / max(1, counts["total"])
    ctx.report.note(
        f"{counts['trainable']:,} parameters train, {share:.2%} of the model's {counts['total']:,}; "
        f"{_counted(trainer.table)}, {steps:,} step{'s' * (steps != 1)}"
    )
    if path:
        ctx.report.note(f"resuming from {path.name}")
    if settings.train.trackers:
        ctx.team.accelerator.init_trackers("ftrun", config={"recipe": settings.recipe})
    trainer.run(signals, path)
    if settings.train.load_best:
        trainer.load_best()


def check_length(trainer: Trainer, begun_with: dict[str, Any], path: Path | None, ctx: Context) -> None:
    """Refuse a resumed run that would be shorter, and say what a longer one is.

    ``begun_with``: train.max_steps and train.epochs when the run was started. Raises CheckpointError.
    """
    settings, after = ctx.settings, trainer.plan.steps
    before = trainer.planned(begun_with["epochs"], begun_with["max_steps"]).steps
    if after < before:
        raise CheckpointError(
            f"{ctx.out} was started with {before:,} steps, and {after:,} are asked for",
            f"train.max_steps={settings.train.max_steps} train.epochs={settings.train.epochs:g}",
            "Resume with as many steps or more, or start a new run.",
        )
    if after == before or path is None:
        return
    done = checkpoint.progress_of(path).step
    name = settings.choice("schedule")
    same = all(trainer.schedule.factor(step, before) == trainer.schedule.factor(step, after) for step in range(done))
    said = f"schedule={name} has given the steps so far the same rates for both lengths"
    if not same:
        said = f"schedule={name} now follows the new length: the rates so far were those of {before:,} steps"
    ctx.report.note(f"the run goes on to step {after:,} instead of {before:,}; {said}")


def save(trainer: Trainer, ctx: Context) -> None:
    """Write adapter/ or model/, and merge where the run asks for it."""
    adapter = trainer.adapter
    assert ctx.bundle is not None and isinstance(adapter, Adapter)
    with trainer.strategy.gathered(ctx.bundle.model) as here:
        if here:
            folder = adapter.save(ctx.bundle.model, ctx.out)
            ctx.bundle.tokenizer.save_pretrained(folder)
            ctx.report.note(f"saved {folder}")
            if folder.name == "adapter":
                shutil.rmtree(ctx.out / "model", ignore_errors=True)  # merged from an earlier state of a resumed run
            if ctx.settings.train.merge and folder.name == "adapter":
                ctx.report.note(f"merged into {merge_run(ctx.out, ctx.settings, ctx.team.device)}")
    ctx.team.barrier()


def _warn_of_large_steps(trainer: Trainer, ctx: Context, trainable: int) -> None:
    table, architecture = trainer.table, trainer.bundle.architecture
    lengths = np.asarray(trainer.tokens.input_lengths(table)).reshape(len(table), -1).sum(axis=1)
    need = estimate.training_bytes(
        ctx.settings, lengths, trainable, architecture.width, len(architecture.layers), ctx.team.device
    )
    ever = sum(parameter.numel() for parameter in trainer.parameters.values())
    need += estimate.narrowed_bytes(ctx.settings, ever, trainer.bundle.dtype)
    if short := estimate.shortage(need, free_memory(ctx)):
        ctx.report.warn(f"training may not fit: {short}")


def _counted(table: TokenTable) -> str:
    """``40 rows``, or ``12 rows in 40 pieces`` where long texts were split: the pieces are what a step draws."""
    pieces = int(table.continues.sum())
    return f"{len(table) - pieces:,} rows" + (f" in {len(table):,} pieces" if pieces else "")
