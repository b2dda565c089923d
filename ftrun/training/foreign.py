"""Groups that another launcher started: torchrun, accelerate, srun, mpirun. Their variables become torch's."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass

from ftrun.config.settings import LaunchConfig
from ftrun.errors import ConfigError

PORTS = range(20000, 30000)  # below those that systems hand out by themselves
# rank, size, rank on the machine, size on the machine
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class Group:
    """This process among those that were started together."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str | None  # of the first process
    port: int | None


def join(launch: LaunchConfig, named: Collection[str], environment: MutableMapping[str, str] = os.environ) -> None:
    """Take part in the group that another launcher made of this process.

    The group says how many processes there are, unless the command line (``named`` keys) does. Raises ConfigError when
    both do and differ, or when only one process came up of several.
    """
    if "FTRUN_ERROR_FILE" in environment or launch.rendezvous is not None:
        return  # started by our own launcher; or to be one of several launchers that meet
    group = found(environment)
    if group is None:
        _refuse_lonely(environment)
        return
    asked = launch.processes * launch.nodes
    if asked != group.size and any(key in named for key in ("launch.processes", "launch.nodes", "launch")):
        error = ConfigError(
            f"{asked} process{'es were' if asked > 1 else ' was'} asked for, {group.launcher} has started {group.size}",
            f"launch.processes={launch.processes} launch.nodes={launch.nodes}",
            f"Leave these keys out, and {group.launcher} says how many there are; or start ftrun without it.",
        )
        error.secondary = group.rank > 0
        raise error
    launch.processes, launch.nodes = group.local_size, -(-group.size // group.local_size)
    if group.size != launch.processes * launch.nodes:
        launch.processes, launch.nodes = group.size, 1  # the machines have different numbers of them
    if group.address is None or group.port is None:
        raise ConfigError(
            f"{group.launcher} has started processes on several machines and does not say where they meet",
            "MASTER_ADDR, MASTER_PORT",
            "Set both for all of them, as in: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ...",
        )
    environment["RANK"], environment["WORLD_SIZE"] = str(group.rank), str(group.size)
    environment["LOCAL_RANK"], environment["LOCAL_WORLD_SIZE"] = str(group.local_rank), str(group.local_size)
    environment["MASTER_ADDR"], environment["MASTER_PORT"] = group.address, str(group.port)


def found(environment: Mapping[str, str]) -> Group | None:
    """The group that the variables tell of; None for a process on its own. One task of Slurm is no group."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        size = int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_RANK", environment["RANK"]))
        here = int(environment.get("LOCAL_WORLD_SIZE", size))
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "the launcher"
        return Group(launcher, int(environment["RANK"]), size, local, here, *_master(environment, "127.0.0.1", 29500))
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        return _slurm(environment)
    for rank, size, local_rank, local_size in MPI:
        if int(environment.get(size, 1)) > 1 and rank in environment:
            return _mpi(environment, rank, size, local_rank, local_size)
    return None


def _slurm(environment: Mapping[str, str]) -> Group:
    size, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", 1))
    first = first_host(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    job, step = int(environment.get("SLURM_JOB_ID", 0)), environment.get("SLURM_STEP_ID", "0")
    port = PORTS[(job + (int(step) if step.isdecimal() else 0)) % len(PORTS)]
    address, port = _master(environment, "127.0.0.1" if nodes == 1 else first, port)
    here = int(re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", str(size // nodes)))[0])  # type: ignore[index]
    rank, local = int(environment["SLURM_PROCID"]), int(environment.get("SLURM_LOCALID", 0))
    return Group("srun", rank, size, local, here, address, port)


def _mpi(environment: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> Group:
    everyone, number = int(environment[size]), int(environment[rank])
    if local_size in environment:
        local, here = int(environment.get(local_rank, number)), int(environment[local_size])
    else:
        local, here = number, everyone  # it says nothing of machines
    alone = here == everyone
    port = PORTS[os.getppid() % len(PORTS)] if alone else None  # of the launcher, the same for all
    return Group("mpirun", number, everyone, local, here, *_master(environment, "127.0.0.1" if alone else None, port))


def _master(environment: Mapping[str, str], address: str | None, port: int | None) -> tuple[str | None, int | None]:
    given = environment.get("MASTER_PORT")
    return environment.get("MASTER_ADDR") or address, int(given) if given else port


def first_host(nodes: str) -> str:
    """The first of a list of machines as Slurm writes it: ``gpu[07-09,12],cpu1`` is gpu07."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,]*)", nodes)
    if match is None:
        return nodes
    inside = re.split(r"[,-]", match[2])[0] if match[2] else ""
    return match[1] + inside + match[3]


def _refuse_lonely(environment: Mapping[str, str]) -> None:
    """``accelerate launch --cpu --num_processes 2`` without mpirun starts one process and says so nowhere."""
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment:
        raise ConfigError(
            "accelerate was asked for several processes and has started one",
            "accelerate launch --num_processes",
            "Start ftrun without it: ftrun train ... launch.processes=N",
        )
