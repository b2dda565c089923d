"""Which strategy a run takes: what was asked for, or whole copies where they fit."""

from __future__ import annotations

from ftrun import registry
from ftrun.config.settings import Settings
from ftrun.errors import ConfigError
from ftrun.models.load import parameters_in, resolve_dtype
from ftrun.runs import memory
from ftrun.runs.progress import Reporter
from ftrun.training import estimate
from ftrun.training.distributed import Team
from ftrun.training.strategies.base import Strategy
from ftrun.training.strategies.ddp import Ddp
from ftrun.training.strategies.fsdp import Fsdp

SMALL = 0.01  # share of a model's size that an adapter is taken to have, before it is there


def choose(settings: Settings, team: Team, report: Reporter) -> Strategy:
    """The strategy of a run. Raises ConfigError where slices were asked for and there is one process."""
    launch = settings.launch
    if team.world_size == 1:
        if launch.strategy == "fsdp":
            raise ConfigError(
                "one process has nothing to share slices with",
                "launch.strategy=fsdp",
                "Add launch.processes=2 or more.",
            )
        return Strategy(team)
    wanted = launch.strategy
    if wanted == "auto":
        wanted, why = _fitting(settings, team)
        report.note(f"launch.strategy=auto takes {wanted}: {why}")
    if wanted == "ddp":
        return Ddp(team)
    return Fsdp(team, launch.fsdp.reshard_after_forward, launch.fsdp.offload)


def _fitting(settings: Settings, team: Team) -> tuple[str, str]:
    """ddp where a copy of the model with its gradients and optimiser fits into the memory of a process, and why."""
    need = _copy_bytes(settings, team)
    free = memory.available_bytes(team.device) / (settings.launch.processes if team.device.type == "cpu" else 1)
    if need <= free:
        return "ddp", f"a whole copy for each process takes about {_gib(need)} of {_gib(free)}"
    unfit = [
        f"{spec.slot}={spec.name}"
        for slot in settings.slots
        for name in settings.choices(slot)
        if "whole_weights" in (spec := registry.find(slot, name)).needs
    ]
    if unfit:
        return "ddp", f"{unfit[0]} needs whole weights, though a copy takes about {_gib(need)} of {_gib(free)}"
    return "fsdp", f"a whole copy for each process would take about {_gib(need)} of {_gib(free)}"


def _copy_bytes(settings: Settings, team: Team) -> float:
    parameters = parameters_in(settings.model)
    dtype = resolve_dtype(settings.model.dtype, team.device)
    base = "trainable_base" in registry.find("adapter", settings.choice("adapter")).needs
    ever = parameters if base else int(parameters * SMALL)
    trained = estimate.Trained(active=ever, ever=ever, base=ever if base else 0)
    weights = estimate.weight_bytes(settings, parameters, 0, dtype) + estimate.widening_bytes(settings, trained, dtype)
    return weights + ever * (4 + settings.component("optim").state_bytes())


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
