"""``ftrun cancel``: end a job, or a run on this machine; what it has done is saved."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from ftrun.cluster import slurm
from ftrun.errors import ConfigError
from ftrun.runs.progress import Reporter
from ftrun.runs.state import holder, is_alive
from ftrun.verbs.status import find


def cancel(what: str | None) -> dict[str, Any]:
    """Tell the named run or job to save and stop; returns which were told. Raises ConfigError where there is no such."""
    if what is None:
        raise ConfigError(
            "cancel what?", "ftrun cancel", "Give the folder of a run, or the id of a job; ftrun status lists them."
        )
    submitted, runs = find(what)
    queued = slurm.queue([run.job for run in runs])
    jobs = [run.job for run in runs if run.job in queued and not queued[run.job].over]
    report = Reporter()
    if submitted and len(jobs) == len(submitted.runs) > 1:
        slurm.cancel(submitted.job)
    else:
        for job in jobs:
            slurm.cancel(job)
    folders = [submitted.folder(run) for run in runs] if submitted else [Path(what).expanduser()]
    told = [] if jobs else [folder for folder in folders if _stop(folder)]
    for job in jobs:
        report.note(f"job {job} is told to stop; it saves first")
    for folder in told:
        report.note(f"the run in {folder} is told to stop; it saves first")
    if not (jobs or told):
        report.note(f"{what} has ended already")
    return {"cancelled": [*jobs, *map(str, told)]}


def _stop(folder: Path) -> bool:
    """Ask the process that works in ``folder`` to save and leave; False when there is none."""
    who = holder(folder)
    alive = is_alive(who)
    if alive is None and not (folder / "summary.json").exists():
        raise ConfigError(
            f"the run works on {who.get('host')}", str(folder), f"Cancel it there: kill {who.get('pid')}."
        )
    if not alive or (folder / "summary.json").exists():
        return False
    os.kill(who["pid"], signal.SIGTERM)
    return True
