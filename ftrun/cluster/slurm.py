"""Slurm's commands: what they are asked, and what they answer."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ftrun.errors import ComponentError, ConfigError

SECONDS = 60  # a controller that does not answer for so long is down
UNREACHABLE = ("Unable to contact", "Connection refused", "timed out", "Zero Bytes", "Communication connection failure")
FIELDS = ("%i", "%T", "%r", "%L", "%N")  # of squeue: job, state, reason, time left, machines
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED", "STOPPED")
AT_WORK = ("RUNNING", "COMPLETING", "STAGE_OUT", "RESIZING", "SIGNALING")


@dataclass(frozen=True)
class Queued:
    """A job, or an element of an array, as Slurm sees it."""

    job: str
    state: str  # in Slurm's words: PENDING, RUNNING, CANCELLED ...
    reason: str  # why it waits; "" where it does not
    seconds_left: int | None  # until its time limit
    nodes: str

    @property
    def over(self) -> bool:
        return self.state not in (*WAITING, *AT_WORK)


def require() -> None:
    """Raise ConfigError where Slurm is not on this machine."""
    if not shutil.which("sbatch"):
        todo = "Submit on a machine of the cluster, or see the script with cluster.dry_run=true."
        raise ConfigError("there is no Slurm on this machine: sbatch is not installed", "cluster=slurm", todo)


def submit(script: Path) -> str:
    """Hand a script to sbatch; returns the job's id.

    Raises ConfigError where Slurm refuses the job, ComponentError where it does not answer.
    """
    answer = _ask(["sbatch", "--parsable", str(script)])
    if answer.returncode:
        raise ConfigError(f"Slurm refuses the job: {_complaint(answer)}", str(script), "Mend the cluster section.")
    found = re.match(r"\d+", answer.stdout.strip())
    if not found:
        raise ComponentError(f"sbatch answered without a job's id: {answer.stdout.strip()[:200]!r}", str(script))
    return found[0]


def queue(jobs: Sequence[str]) -> dict[str, Queued]:
    """What Slurm still knows of these jobs, elements of arrays one by one; nothing where there is no Slurm here."""
    ids = sorted({job.partition("_")[0] for job in jobs})
    if not ids or not shutil.which("squeue"):
        return {}
    answer = _ask(
        ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}", f"--format={'|'.join(FIELDS)}"]
    )
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise ComponentError(f"squeue: {_complaint(answer)}", todo="Is the controller of Slurm up?")
    return {one.job: one for one in map(_read, answer.stdout.splitlines()) if one}


def cancel(job: str) -> None:
    """End a job: Slurm tells its processes to stop, and they save. Raises ConfigError where it cannot be ended."""
    if not shutil.which("scancel"):
        raise ConfigError("there is no Slurm on this machine: scancel is not installed", f"job {job}")
    answer = _ask(["scancel", job])
    if answer.returncode:
        raise ConfigError(f"Slurm does not end the job: {_complaint(answer)}", f"job {job}")


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise ComponentError(
            f"{command[0]} gave no answer in {SECONDS} s", todo="Is the controller of Slurm up?"
        ) from None
    if answer.returncode and any(word in answer.stderr for word in UNREACHABLE):
        raise ComponentError(f"Slurm does not answer: {_complaint(answer)}", todo="Is the controller of Slurm up?")
    return answer


def _complaint(answer: subprocess.CompletedProcess[str]) -> str:
    """What a command said, without its name in front."""
    lines = [re.sub(r"^s\w+: (error|fatal): ", "", line) for line in answer.stderr.strip().splitlines()]
    return "; ".join(lines) or f"exit code {answer.returncode}"


def _read(line: str) -> Queued | None:
    words = line.strip().split("|")
    if len(words) != len(FIELDS):
        return None
    job, state, reason, left, nodes = words
    return Queued(job, state, "" if reason == "None" else reason, seconds(left), nodes)


def seconds(text: str) -> int | None:
    """``1-02:03:04`` or ``03:04`` in seconds; None for UNLIMITED, INVALID and NOT_SET."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){1,2}", text):
        return None
    days, _, clock = text.rpartition("-")
    total = 0
    for part in clock.split(":"):
        total = total * 60 + int(part)
    return int(days or 0) * 86400 + total
