"""``ftrun plan``: parameters, memory and time of every stage, before any weight is loaded."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftrun.config.compose import Composed
from ftrun.config.settings import Settings
from ftrun.config.values import parse_budget
from ftrun.data.batches import Plan, token_budget
from ftrun.models.architecture import Architecture, describe
from ftrun.models.load import meta_model, resolve_dtype
from ftrun.runs.artifacts import write_json
from ftrun.runs.memory import available_bytes
from ftrun.select.base import PlannedTraining
from ftrun.select.order import picker_of
from ftrun.stages import shape
from ftrun.stages.chain import Chain
from ftrun.stages.recorded import logical_parameters
from ftrun.stages.trained import plain_context
from ftrun.training import estimate
from ftrun.training.estimate import Trained
from ftrun.training.signals import StopSignals


@dataclass
class Stage:
    name: str
    tokens: float
    flops: float
    memory: float
    steps: int | None = None  # of the optimiser, where it trains


def plan(composed: Composed) -> dict[str, Any]:
    """Print the estimate as tables and return it, as plan.json in ``out`` too. Only rows and tokenizer are loaded."""
    with tempfile.TemporaryDirectory(prefix="ftrun-plan-") as scratch:
        found = _estimated(composed, Path(scratch))
    if out := composed.settings.out:
        write_json(Path(out) / "plan.json", found)
    return found


def _estimated(composed: Composed, scratch: Path) -> dict[str, Any]:
    settings = composed.settings
    asked = replace(settings.launch)
    ctx = plain_context(settings, scratch)
    settings.launch = asked  # the plan is made by one process, for as many as were asked for
    chain = Chain(ctx, composed, [], StopSignals())
    train_pool = chain.rows.training(evaluates=False)
    chain.check_budget(train_pool)
    prepared = chain.rows.tokenise(train_pool)
    table = prepared.table
    lengths = np.asarray(table.lengths).reshape(len(table), -1).sum(axis=1)
    model = meta_model(settings.model, settings.task)
    total, embedding = logical_parameters(model), _embedding(model)
    architecture = describe(model)
    ctx.train_tokens = table
    trained = shape.trained(settings, model, ctx)
    pieces = len(table) / len(prepared.kept)
    stages = _stages(settings, lengths, pieces, total, trained, embedding, architecture, ctx.team.device)
    stages = [stage for stage in stages if stage.name.split()[0] in settings.stages]
    speed = _matmul_speed(ctx.team.device)
    _print(ctx.report, settings, total, trained.active, stages, speed)
    for note in composed.notes:
        ctx.report.note(note)
    # the processes of a machine without GPUs share its memory
    sharers = settings.launch.processes if ctx.team.device.type == "cpu" else 1
    available = available_bytes(ctx.team.device) / sharers
    need = max((stage.memory for stage in stages), default=0.0)
    if short := estimate.shortage(need, available):
        ctx.report.warn(short)
    return {
        "total_parameters": total,
        "trainable_parameters": trained.active,
        "rows": len(prepared.kept),
        "fits": need <= available,
        "available_bytes": available,
        "stages": {
            stage.name: {"tokens": stage.tokens, "memory_bytes": stage.memory, "seconds": stage.flops / speed}
            | ({} if stage.steps is None else {"steps": stage.steps})
            for stage in stages
        },
    }


def _stages(
    settings: Settings,
    lengths: np.ndarray,
    pieces: float,
    total: int,
    trained: Trained,
    embedding: int,
    architecture: Architecture,
    device: torch.device,
) -> list[Stage]:
    body = total - embedding  # looking a token up costs nothing; the head is part of the body unless it is tied
    tables = architecture.vocabulary * architecture.width * (1 if architecture.tied else 2)
    dtype = resolve_dtype(settings.model.dtype, device)
    weight_bytes = estimate.weight_bytes(settings, total, tables, dtype)
    width, layers = architecture.width, len(architecture.layers)
    stages = []
    picked = _picked(lengths, pieces, settings)
    trainings = planned_trainings(settings, round(len(lengths) / pieces), round(len(picked) / pieces))
    if trainings:
        tokens = [float(lengths.mean()) * pieces * one.rows * one.epochs for one in trainings]
        flops = [(6.0 if one.full else 4.0) * total * count for one, count in zip(trainings, tokens, strict=True)]
        size = max(one.batch_size for one in trainings)
        inner = replace(settings, train=replace(settings.train, batch_size=size))  # batches of the largest of them
        changed = total if any(one.full for one in trainings) else 0
        memory = weight_bytes + estimate.training_bytes(inner, lengths, changed, width, layers, device)
        memory += estimate.widening_bytes(inner, Trained(changed, changed, changed), dtype)
        steps = sum(one.steps for one in trainings)
        stages.append(Stage("select training", sum(tokens), sum(flops), memory, steps))
    if settings.choice("select") != "none":
        tokens = settings.component("select").planned_tokens(lengths)
        stages.append(
            Stage(
                "select",
                tokens,
                2.0 * (body + embedding) * tokens,
                weight_bytes + token_budget(settings.select.batch_tokens, device) * width * 4 * 12,
            )
        )
    run = Plan.of(
        len(picked), settings.train.batch_size, settings.train.epochs, settings.train.max_steps, settings.seed
    )
    step_tokens = float(picked.mean()) * settings.train.batch_size
    passes = 6.0 if trained.active > 0.5 * total else 4.0  # a frozen weight needs no gradient of its own
    activations = estimate.training_bytes(settings, picked, 0, width, layers, device)
    held = weight_bytes + estimate.widening_bytes(settings, trained, dtype)
    held += estimate.training_bytes(settings, picked, trained.active, width, layers, device) - activations
    if settings.launch.strategy == "fsdp":
        largest = weight_bytes * (tables / total + (1 - tables / total) / layers)  # whole while a layer is at work
        held = held / processes_of(settings) + largest
    memory = held + activations
    tokens = step_tokens * run.steps
    stages.append(
        Stage(
            "train",
            tokens,
            passes * total * tokens * (4 / 3 if settings.train.gradient_checkpointing else 1),
            memory,
            run.steps,
        )
    )
    return stages


def processes_of(settings: Settings) -> int:
    """Processes of the run, on all machines."""
    return settings.launch.processes * settings.launch.nodes


def planned_trainings(settings: Settings, pool: int, picked: int) -> list[PlannedTraining]:
    """What the selection trains on its way to ``picked`` of ``pool`` rows."""
    return [
        *settings.component("select").planned_trainings(pool),
        *picker_of(settings).planned_trainings(picked),
    ]


def _picked(lengths: np.ndarray, pieces: float, settings: Settings) -> np.ndarray:
    """As many lengths as the budget takes; a row has ``pieces`` of them on average."""
    budget = parse_budget(settings.budget)
    if budget is None:
        return lengths
    kind, amount = budget
    rows = (
        amount * pieces
        if kind == "rows"
        else amount * len(lengths)
        if kind == "share"
        else amount / max(1.0, lengths.mean())
    )
    return lengths[: max(1, min(len(lengths), round(rows)))]


def _embedding(model: Any) -> int:
    return model.get_input_embeddings().weight.numel()


def _matmul_speed(device: torch.device) -> float:
    """Multiply-add operations a second of a large matmul here, halved: what a training step reaches of it.

    On a CPU the time is that of this process, so that other work on the machine does not distort the estimate.
    """
    on_cpu = device.type == "cpu"
    size = 1024 if on_cpu else 8192
    clock, shared_by = (time.process_time, torch.get_num_threads()) if on_cpu else (time.perf_counter, 1)
    left, right = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    torch.mm(left, right)
    started, begun, count = clock(), time.perf_counter(), 0
    while time.perf_counter() - begun < 0.2:
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 1
    return 2 * size**3 * count * shared_by / (clock() - started) / 2


def _print(report: Any, settings: Settings, total: int, trainable: int, stages: list[Stage], speed: float) -> None:
    from ftrun.runs.numbers import duration

    report.table(
        f"{settings.recipe or 'plan'}: {total / 1e6:,.1f}M parameters, {trainable:,} train ({trainable / total:.2%})",
        ["stage", "steps", "tokens", f"memory{' a process' * (processes_of(settings) > 1)} (GiB)", "time, about"],
        [
            [
                stage.name,
                stage.steps or "",
                round(stage.tokens),
                f"{stage.memory / 2**30:.2f}",
                duration(stage.flops / speed),
            ]
            for stage in stages
        ],
    )
