"""The batch script of a job: plain, readable, and able to be submitted by hand.

submitit does not write it: its scripts run a pickled function of Python, listen to a signal of its own choosing, and
requeue from inside that function; this one starts the command that the user typed, and Slurm's state is all it keeps.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ftrun.config.cluster import ClusterConfig, processes_of
from ftrun.config.grammar import quote

FIRST_PORT, PORTS = 20000, 10000  # below those that Linux hands out by itself
STRAGGLER_SECONDS = 600  # what the last machine gets to write its files after the first one has left


@dataclass(frozen=True)
class Member:
    """One run of a job: a job has one, a sweep's array one an element."""

    words: list[str]  # overrides of the run, without its folder
    out: str  # its folder
    resumed: bool = False  # whether the user resumes a run that is there already


@dataclass(frozen=True)
class Job:
    """What a script is made from."""

    typed: list[str]  # the words behind `ftrun submit`
    verb: str
    name: str
    members: list[Member]
    sweeps: bool
    folder: Path  # where Slurm writes what the job prints
    start_in: Path
    program: list[str]  # starts ftrun
    recipes: str = ""  # folders given with --recipes


def render(job: Job, cluster: ClusterConfig) -> str:
    """The script that sbatch is given."""
    parts = [
        ["#!/bin/bash", f"# {shlex.join(['ftrun', 'submit', *job.typed])}".replace("\n", "\\n")],
        [f"#SBATCH {line}" for line in options(job, cluster)],
        ["# the time limit is near: the run saves, leaves with 143, and the job queues itself again", *TRAPS],
        [f"export FTRUN_RECIPES={shlex.quote(job.recipes)}"] if job.recipes else [],
        ["# setup", "set -e", *cluster.setup, "set +e"] if cluster.setup else [],
        _command(job),
        _meeting(cluster),
        _step(job, cluster),
        *([_again(cluster)] if cluster.requeue else []),
        ['exit "$status"'],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def options(job: Job, cluster: ClusterConfig) -> list[str]:
    """The options of sbatch, one a line."""
    count = len(job.members)
    asked = {
        "job-name": job.name,
        "output": str(job.folder / ("slurm-%A_%a.out" if job.sweeps else "slurm-%j.out")),
        "open-mode": "append",
        "chdir": str(job.start_in),
        "array": f"0-{count - 1}" + (f"%{cluster.array}" if cluster.array else "") if job.sweeps else None,
        "nodes": cluster.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": _cores(cluster),
        "gpus-per-node": cluster.gpus_per_node or None,
        "mem": cluster.mem,
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "signal": f"B:USR1@{cluster.signal_seconds}",
    }
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in asked.items() if value is not None]
    return [*lines, "--requeue" if cluster.requeue else "--no-requeue", *cluster.sbatch]


def _cores(cluster: ClusterConfig) -> int | None:
    """CPU cores of a machine's share; a task of Slurm is the one agent that starts all processes of a machine."""
    return cluster.cpus_per_task * processes_of(cluster) if cluster.cpus_per_task else None


TRAPS = (
    "leaving= step=",
    "trap 'leaving=yes; [[ -z $step ]] || kill -USR1 \"$step\"' USR1",
    "trap 'leaving=' TERM  # cancelled or preempted: what follows is Slurm's to say",
)


def _command(job: Job) -> list[str]:
    """The command line of the run, and the word that makes it begin or go on in its folder."""
    start = shlex.join([*job.program, job.verb])
    if job.sweeps:
        cases = [f"{number}) command+=({_words(member)}" for number, member in enumerate(job.members)]
        lines = [f"command=({start})", "case $SLURM_ARRAY_TASK_ID in", *(f"{case} ;;" for case in cases), "esac"]
    else:
        lines = [f"command=({start} {_words(job.members[0])}"]
    if all(member.resumed for member in job.members):
        return ["# the run", *lines]
    quoted = any(_in_grammar(member.out) != member.out for member in job.members)
    return [
        "# the run; where its folder holds one already, it goes on",
        *lines,
        "if [[ -e $out/identity.json ]]; then key=resume; else key=out; fi",
        f'command+=("$key={"$place" if quoted else "$out"}")',
    ]


def _words(member: Member) -> str:
    """The rest of an array of words, and the folder: as the shell reads it, and as our overrides do where they differ."""
    place = _in_grammar(member.out)
    apart = "" if place == member.out else f" place={shlex.quote(place)}"
    return f"{shlex.join(member.words)}) out={shlex.quote(member.out)}{apart}"


def _in_grammar(folder: str) -> str:
    return folder if re.fullmatch(r"[\w./+-]+", folder, re.ASCII) else quote(folder)


def _meeting(cluster: ClusterConfig) -> list[str]:
    """Where the machines meet: each starts the same command, and is given its number there."""
    processes = processes_of(cluster)
    if cluster.nodes == 1:
        return [f"command+=(launch.processes={processes})"] if processes > 1 else []
    return [
        "# one agent a machine starts the processes there; they meet at the first machine",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        'address=$(scontrol show node --oneliner "$first" | sed -E "s/.* NodeAddr=([^ ]+).*/\\1/")',
        f"port=$(({FIRST_PORT} + (SLURM_JOB_ID + 1009 * ${{SLURM_RESTART_COUNT:-0}}) % {PORTS}))",
        f'command+=(launch.nodes={cluster.nodes} launch.processes={processes} "launch.rendezvous=$address:$port")',
    ]


def _step(job: Job, cluster: ClusterConfig) -> list[str]:
    """Start the run, wait for its end whatever signals come, and take its exit code."""
    cores = _cores(cluster)
    given = f" --cpus-per-task={cores}" if cores else ""  # srun does not take it over from sbatch
    several = f" --wait={STRAGGLER_SECONDS}" if cluster.nodes > 1 else ""
    return [
        f'srun{given}{several} "${{command[@]}}" &',
        "step=$!",
        '[[ -z $leaving ]] || kill -USR1 "$step"',
        'while :; do wait "$step"; status=$?; kill -0 "$step" 2>/dev/null || break; done',
        "# the code itself, where a signal has cut the last wait short; bash may have forgotten it by then",
        'wait "$step" 2>/dev/null; last=$?; ((last < 0 || last == 127)) || status=$last',
    ]


def _again(cluster: ClusterConfig) -> list[str]:
    # 138: the signal came while the interpreter was starting, before anything could be lost
    return [
        f"if [[ $leaving && $status =~ ^(143|138)$ && ${{SLURM_RESTART_COUNT:-0}} -lt {cluster.max_requeues} ]]; then",
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
    ]
