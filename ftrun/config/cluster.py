"""The cluster section: what ``ftrun submit`` asks a batch system for. No run reads it, so no run's config holds it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftrun.config import plain_yaml
from ftrun.config.explain import parse
from ftrun.config.schema import check_section
from ftrun.config.store import group_files
from ftrun.errors import ConfigError, nearest
from ftrun.registry import Knob, read_dataclass

SECTION = "cluster"
MANAGED = {
    "launch.processes": "cluster.processes, or cluster.gpus_per_node for one process a GPU",
    "launch.nodes": "cluster.nodes",
    "launch.rendezvous": "",
}  # keys that the job sets -> what to write instead
# as Slurm reads a time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?", re.ASCII)


@dataclass
class ClusterConfig:
    """What a job asks for."""

    nodes: int = 1  # machines
    gpus_per_node: int = 0  # GPUs of each machine
    processes: int | None = None  # processes on each machine; null: one a GPU, or one
    cpus_per_task: int | None = None  # CPU cores of each process; null: what the cluster gives
    mem: str | None = None  # memory of each machine, as in 64G; null: what the cluster gives
    time: str | None = None  # time limit, as in 04:00:00 or 1-12:00:00; null: that of the partition
    partition: str | None = None  # partition to wait in
    account: str | None = None  # account to charge
    qos: str | None = None  # quality of service
    constraint: str | None = None  # features that the machines must have, as in a100|h100
    signal_seconds: int = 180  # time to save in: SIGUSR1 comes this long before the time limit
    requeue: bool = True  # queue again when preempted, when a machine fails, and at the time limit, and go on
    max_requeues: int = 50  # times that a job queues itself again at its time limit
    array: int | None = None  # jobs of a sweep that may run at the same time; null: all
    sbatch: list[str] = field(default_factory=list)  # further options of sbatch: ['--exclusive','--mail-type=END']
    setup: list[str] = field(default_factory=list)  # shell commands before the run: ['module load cuda']
    dry_run: bool = False  # print the script, submit nothing


def cluster_knobs() -> dict[str, Knob]:
    """Knobs of the cluster section."""
    return read_dataclass(Path(__file__), "ClusterConfig")


def is_cluster_word(word: str) -> bool:
    """Whether an override belongs to the cluster section."""
    key = word.partition("=")[0].lstrip("+~").replace("/", ".")
    return key == SECTION or key.startswith(f"{SECTION}.")


def read_cluster(words: Sequence[str]) -> ClusterConfig:
    """The cluster section that these overrides of it give.

    Raises ConfigError for an unknown key or choice, and for a value that does not fit.
    """
    given: dict[str, Any] = {}
    chosen = "slurm"
    for override in parse(list(words)):
        line = str(override.input_line)
        if override.is_sweep_override():
            todo = "All jobs of a sweep ask for the same. Submit twice where they should not."
            raise ConfigError(f"{override.key_or_group} has several values", line, todo)
        if override.is_delete():
            raise ConfigError("the cluster section cannot be taken away", line, "Leave that word out.")
        if override.key_or_group == SECTION:
            chosen = override.value()
        else:
            _put(given, override.key_or_group.replace("/", ".").removeprefix(f"{SECTION}."), override.value(), line)
    cluster = ClusterConfig(**check_section(_chosen(chosen) | given, cluster_knobs(), SECTION))
    _check(cluster)
    return cluster


def _put(given: dict[str, Any], key: str, value: Any, line: str) -> None:
    if "." in key:
        raise ConfigError(f'there is no key "{SECTION}.{key}"', line, nearest(key.split(".")[0], cluster_knobs()))
    given[key] = value


def _chosen(name: Any) -> dict[str, Any]:
    """The values of ``cluster=NAME``, or of a site's own file."""
    known = group_files(SECTION)
    file = Path(str(name)).expanduser()
    if name in known:
        file = known[name]
    elif not isinstance(name, str) or file.suffix not in (".yaml", ".yml"):
        todo = f"{nearest(str(name), known)} For values of your own: cluster=./site.yaml; docs/cluster.md has other clusters."
        raise ConfigError(f'cluster has no choice "{name}"', f"cluster={name}", todo)
    if not file.exists():
        raise ConfigError(f"there is no file {file}", f"cluster={name}", "Check the path.")
    values = plain_yaml.parse(plain_yaml.read_text(file), file) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds no keys", f"cluster={name}", "Write `partition: gpu`, a line each.")
    return values


def _check(cluster: ClusterConfig) -> None:
    """Raise ConfigError for a value out of its range."""
    for name in ("nodes", "processes", "cpus_per_task", "signal_seconds", "array"):
        value = getattr(cluster, name)
        if value is not None and value < 1:
            raise ConfigError(f"cluster.{name} must be above 0, not {value}", f"cluster.{name}={value}")
    for name in ("gpus_per_node", "max_requeues"):
        value = getattr(cluster, name)
        if value < 0:
            raise ConfigError(f"cluster.{name} must be 0 or above, not {value}", f"cluster.{name}={value}")
    for name, value in vars(cluster).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and name != "setup" and (not text.strip() or "\n" in text):
                raise ConfigError(f"cluster.{name} must be one line of text", f"cluster.{name}={text}")
    for option in cluster.sbatch:
        if not option.startswith("-"):
            todo = "Write it as on its command line: 'cluster.sbatch=[\"--exclusive\"]'."
            raise ConfigError(f"{option} is no option of sbatch", f"cluster.sbatch={option}", todo)
    if cluster.gpus_per_node and cluster.processes and cluster.processes > cluster.gpus_per_node:
        raise ConfigError(
            f"{cluster.processes} processes cannot share {cluster.gpus_per_node} GPUs",
            f"cluster.processes={cluster.processes} cluster.gpus_per_node={cluster.gpus_per_node}",
            "Each takes one: leave cluster.processes out.",
        )
    limit = seconds_of(cluster.time)
    if limit is not None and limit <= cluster.signal_seconds:
        raise ConfigError(
            f"the signal to save would come {cluster.signal_seconds} s before a limit of {limit} s",
            f"cluster.time={cluster.time} cluster.signal_seconds={cluster.signal_seconds}",
            "Give the job more time, or cluster.signal_seconds less.",
        )


def seconds_of(time: str | None) -> int | None:
    """A time limit in seconds; None where there is none. Raises ConfigError for what Slurm could not read."""
    if time is None or time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    found = _TIME.fullmatch(time)
    if not found:
        todo = "Write hours:minutes:seconds as in 04:00:00, days-hours as in 1-12, or minutes."
        raise ConfigError(f'"{time}" is no time limit', f"cluster.time={time}", todo)
    days, *parts = (int(part) if part is not None else None for part in found.groups())
    first, second, third = parts
    if days is not None:
        return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    if second is None:
        return (first or 0) * 60
    return ((first or 0) * 60 + second) * 60 + third if third is not None else (first or 0) * 60 + second


def without_cluster(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of the run itself, and those of the cluster section.

    Raises ConfigError for a key of the run that the job sets.
    """
    own = [word for word in overrides if not is_cluster_word(word)]
    for word in own:
        key = word.partition("=")[0].lstrip("+~").replace("/", ".")
        if key in MANAGED:
            instead = MANAGED[key]
            raise ConfigError(
                f"the job sets {key} by itself", word, f"Write {instead}." if instead else "Leave that word out."
            )
    return own, [word for word in overrides if is_cluster_word(word)]


def processes_of(cluster: ClusterConfig) -> int:
    """Processes on each machine."""
    return cluster.processes or cluster.gpus_per_node or 1
