"""A run and its record: the folder, who may write there, how the run ended, and what it depended on."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ftrun.config.compose import Composed
from ftrun.config.settings import Settings
from ftrun.errors import CheckpointError, ComponentError, ConfigError, FtrunError, Interrupted, Preempted
from ftrun.reporting.html import write_report
from ftrun.reporting.selection import write_selection_report
from ftrun.reporting.terminal import results_table
from ftrun.runs import lockfile, memory
from ftrun.runs.artifacts import RunLock, full_disk_guard, new_run_folder, write_json, write_text
from ftrun.runs.progress import Reporter
from ftrun.training.context import Context
from ftrun.training.distributed import Team
from ftrun.training.loop import Trainer
from ftrun.training.signals import StopSignals, error_for
from ftrun.training.strategies.choice import choose

OUTPUTS = ("selection", "train", "eval", "adapter", "model")  # what a run computes, as against what it says of itself
SPARE, SPARE_BYTES = ".spare", 1 << 16  # given up at the end, so that a full disk has room for how the run ended
# settings that may differ between a run and its continuation: they do not change what is computed
FREE_ON_RESUME = {"out", "resume", "launch", "stages", "eval", "prompt"}
LENGTH = ("max_steps", "epochs")  # of train: a resumed run may be longer
FREE_TRAIN_KEYS = {"save_steps", "keep_checkpoints", "log_steps", "trackers", "eval_before", "merge", "batch_tokens"}


def carry_out(settings: Settings, make: Callable[[Context, StopSignals], RecordedRun]) -> dict[str, Any]:
    """Carry out a run with all that surrounds it: seeds, run folder and its lock, processes, signals."""
    torch.manual_seed(settings.seed)
    np.random.seed(settings.seed % 2**32)  # libraries below us may draw from it
    out = run_folder(settings)
    team = Team(settings.launch, settings.train.trackers, str(out))
    report = Reporter(rank=team.rank)
    lock = RunLock(out) if team.is_main else contextlib.nullcontext()
    with lock, StopSignals() as signals, contextlib.closing(report):
        ctx = Context(settings, out, team, report, choose(settings, team, report))
        recorded = make(ctx, signals)
        try:
            recorded.check_folder()
            return recorded.run()
        finally:
            team.close()


def run_folder(settings: Settings) -> Path:
    """Where this run writes. Raises ConfigError when there is no run to resume."""
    if settings.resume:
        folder = Path(settings.resume)
        if not (folder / "config.yaml").exists():
            raise ConfigError(
                f"there is no run in {folder}",
                f"resume={folder}",
                "Give the folder of a run: the one that holds config.yaml.",
            )
        return folder
    return Path(settings.out) if settings.out else new_run_folder(settings.recipe, settings.as_dict())


def holds_work(folder: Path) -> bool:
    """Whether a run has left results here; one that was refused before it computed anything leaves only its record."""
    if any((folder / name).exists() for name in OUTPUTS):
        return True
    try:
        return json.loads((folder / "summary.json").read_text())["status"] != "failed"
    except FileNotFoundError:
        return False
    except (ValueError, KeyError):
        return True


class RecordedRun:
    """A run as its folder tells of it. What it does is up to `stages`."""

    def __init__(self, ctx: Context, composed: Composed, command: Sequence[str], signals: StopSignals):
        self.ctx, self.settings, self.report = ctx, ctx.settings, ctx.report
        self.composed, self.command, self.signals = composed, command, signals
        self.started = time.time()
        self.trainer: Trainer | None = None
        self.selected: np.ndarray | None = None
        self.metrics: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        self.begun_with: dict[str, Any] = {}  # train.max_steps and train.epochs of the run that is resumed

    def stages(self) -> None:
        """What the run is for. Raises FtrunError."""
        raise NotImplementedError

    def run(self) -> dict[str, Any]:
        error: Exception | None = None
        try:
            with (
                memory.memory_guard(
                    "the chain was at work", "Lower train.batch_tokens and select.batch_tokens, or use a smaller model."
                ),
                full_disk_guard(self.ctx.out / "metrics and log"),
            ):
                self._open()
                self.stages()
        except Exception as problem:
            error = self._cause(problem)
        self.signals.close()
        status = (
            "done"
            if error is None
            else {130: "interrupted", 143: "preempted"}.get(getattr(error, "exit_code", 5), "failed")
        )
        try:
            summary = self.close(status, error)
        except FtrunError as problem:
            if error is None:
                raise
            self.report.warn(f"the record of this run is not complete: {problem.what}")
        if error:
            raise error
        return summary

    def _cause(self, problem: Exception) -> Exception:
        """What the user should hear of instead of its consequences."""
        if self.signals.raised and self.signals.asked and not isinstance(problem, self.signals.asked):
            problem = error_for(self.signals.asked)  # a library has put it into other words
        if isinstance(problem, (Interrupted, Preempted)):
            done = self.trainer.progress.step if self.trainer else 0
            problem.where = f"after step {done}, which is saved" if self.saved_step == done > 0 else ""
            problem.todo = f"Go on with the same command and resume={self.ctx.out}."
        elif self.ctx.team.lost_another(problem):
            problem = ComponentError("another process of this run has ended", todo="Its own message says why.")
            problem.secondary = True
        return problem

    def check_folder(self) -> None:
        """Refuse a folder that this run must not write into, before anything in it is touched."""
        out = self.ctx.out
        if self.settings.resume:
            self._check_resumed(self.identity())
        elif self.ctx.team.is_main and holds_work(out):
            raise ConfigError(
                f"{out} already holds a run", f"out={out}", f"Choose another out=DIR, or continue it with resume={out}."
            )

    def _open(self) -> None:
        out = self.ctx.out
        if self.ctx.team.is_main:
            self.write_settings(self.begun_with)
            (out / "summary.json").unlink(missing_ok=True)
            write_text(out / SPARE, " " * SPARE_BYTES)
        self.report.log_to(out / "ftrun.log")
        self.report.stage(f"ftrun {self.settings.recipe or ''}".strip(), str(out))
        for note in self.composed.notes:
            self.report.note(note)

    def write_settings(self, length: Mapping[str, Any]) -> None:
        """Write config.yaml and identity.json; ``length`` is what they say of ``LENGTH`` until another one is accepted."""
        from omegaconf import OmegaConf

        config, identity = self.resolved(), self.identity()
        for plain in (config, identity):
            if "train" in plain:
                plain["train"] = plain["train"] | dict(length)
        write_text(self.ctx.out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        write_json(self.ctx.out / "identity.json", identity)

    def resolved(self) -> dict[str, Any]:
        """What config.yaml holds."""
        return self.settings.as_dict()

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is computed; a resumed run must agree in all of them."""
        plain = {key: value for key, value in self.settings.as_dict().items() if key not in FREE_ON_RESUME}
        plain["train"] = {key: value for key, value in plain["train"].items() if key not in FREE_TRAIN_KEYS}
        return json.loads(json.dumps(plain, default=str))

    def _check_resumed(self, identity: dict[str, Any]) -> None:
        file = self.ctx.out / "identity.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        if before.get("recipe") != identity["recipe"]:
            raise CheckpointError(
                f"{self.ctx.out} is a run of recipe={before.get('recipe')}, not of {identity['recipe']}",
                f"resume={self.ctx.out}",
                "Resume with the command that started the run.",
            )
        self.begun_with = {key: before.get("train", {}).get(key) for key in LENGTH}
        for key in LENGTH:  # whether it is longer is known with the rows
            before.get("train", {}).pop(key, None)
            identity.get("train", {}).pop(key, None)
        changed = _differences(before, identity)
        if changed:
            raise CheckpointError(
                f"{self.ctx.out} was started with other settings: {'; '.join(changed[:4])}",
                f"resume={self.ctx.out}",
                "Resume with the same settings, or start a new run.",
            )

    def close(self, status: str, error: Exception | None) -> dict[str, Any]:
        """Write how the run ended and what it depended on; returns the summary."""
        trained = self.trainer.progress if self.trainer else None
        model = self.ctx.bundle.model if self.ctx.bundle else None
        summary = {
            "recipe": self.settings.recipe,
            "status": status,
            "steps": trained.step if trained else 0,
            "tokens": trained.tokens if trained else 0,
            "wall_s": round(time.time() - self.started, 3),
            "peak_memory_bytes": memory.peak_bytes(),
            "trainable_parameters": self.counts.get("trainable", 0),
            "total_parameters": self.counts.get("total", logical_parameters(model) if model is not None else 0),
            "final_loss": trained.last_loss if trained else None,
            "metrics": self.metrics,
            "selected_rows": len(self.selected) if self.selected is not None else None,
            "out": str(self.ctx.out),
        } | self.extra_summary()
        if error is not None:
            summary["error"] = {
                "what": str(error).splitlines()[0] if str(error) else type(error).__name__,
                "message": str(error),
                "exit_code": getattr(error, "exit_code", 5),
            }
        if self.ctx.team.is_main and self.ctx.out.exists():
            (self.ctx.out / SPARE).unlink(missing_ok=True)
            files = {
                "lock.json": lockfile.describe(self.command, self.settings.seed, self.ctx.facts),
                "summary.json": summary,
            }
            # what says "done" comes last; what says how a run ended must be tried first, for the disk may be full
            for name in sorted(files, reverse=status != "done"):
                write_json(self.ctx.out / name, files[name])
            self._report(status)
        return json.loads(json.dumps(summary, default=str))

    def extra_summary(self) -> dict[str, Any]:
        """Keys that only some kinds of run add."""
        return {}

    def _report(self, status: str) -> None:
        """The page and the last table; a run is not lost because its picture cannot be drawn."""
        try:
            if (self.ctx.out / "selection").is_dir():
                write_selection_report(self.ctx.out)
            write_report(self.ctx.out)
            if status == "done":
                results_table(self.ctx.out, self.report)
        except Exception as problem:
            self.report.warn(f"the report cannot be written: {type(problem).__name__}: {problem}")

    @property
    def saved_step(self) -> int:
        """The newest step that a checkpoint holds."""
        names = [path.name for path in (self.ctx.out / "train" / "checkpoints").glob("step-*")]
        return max((int(name.removeprefix("step-")) for name in names), default=0)


def logical_parameters(model: nn.Module) -> int:
    """Parameters as the architecture counts them: two 4-bit weights share a byte in storage."""
    total = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None) if packed else None
        total += int(np.prod(shape)) if shape is not None else parameter.numel()
    return total


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    """``train.batch_size 8 -> 4`` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for name in sorted(before.keys() | now.keys()):
            found += _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        return found
    return [] if before == now else [f"{key} {before} -> {now}"]
