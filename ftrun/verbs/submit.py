"""``ftrun submit``: a command as a job of a cluster, checked here and run there."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftrun.cluster import records, slurm
from ftrun.cluster.records import INSIDE, Run, Submitted
from ftrun.cluster.script import Job, Member, render
from ftrun.config import compose
from ftrun.config.cluster import ClusterConfig, processes_of, read_cluster, without_cluster
from ftrun.config.explain import parse
from ftrun.config.settings import Settings
from ftrun.errors import ConfigError, FtrunError
from ftrun.runs.artifacts import new_run_folder, write_text
from ftrun.runs.progress import Reporter
from ftrun.runs.state import holds_work
from ftrun.verbs import CHAIN_VERBS, check_command, check_together

MEETING = "localhost:29500"  # stands for the place that the job finds, while the command is checked here


def submit(verb: str | None, overrides: Sequence[str], typed: Sequence[str], sweeps: bool) -> dict[str, Any]:
    """Submit ``ftrun VERB overrides``; returns the job, its script and the folders of its runs.

    ``typed``: the words behind ``ftrun submit`` as they were typed. Raises FtrunError.
    """
    if verb not in CHAIN_VERBS:
        what = "submit what?" if verb is None else f'"ftrun {verb}" cannot be submitted'
        raise ConfigError(what, f"ftrun submit {verb or ''}".strip(), "Write ftrun submit train ..., or select.")
    own, words = without_cluster(overrides)
    cluster = read_cluster(words)
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    jobs = _jobs(own, sweeps)
    settings = [_checked(verb, job, cluster, sweeps) for job in jobs]
    members, whole = _placed(settings, jobs, own, sweeps, stamp)
    job = Job(
        typed=list(typed),
        verb=verb,
        name=f"ftrun-{settings[0].recipe or verb}",
        members=members,
        sweeps=sweeps,
        folder=(Path.cwd() / whole / INSIDE),
        start_in=Path.cwd(),
        program=[sys.executable, "-m", "ftrun"],
        recipes=os.environ.get("FTRUN_RECIPES", ""),
    )
    script = render(job, cluster)
    result: dict[str, Any] = {"job": None, "out": str(whole), "runs": [member.out for member in members]}
    if cluster.dry_run:
        return result | {"script": script}
    slurm.require()
    for member in members:
        _check_free(member)
    return result | _hand_over(job, script, jobs)


def _jobs(own: Sequence[str], sweeps: bool) -> list[list[str]]:
    """The overrides of every run."""
    for word in own:
        if word.lstrip("+~").startswith("hydra"):
            todo = (
                "A sweep becomes an array of the cluster, one element a run: leave Hydra's launchers and sweepers out."
            )
            raise ConfigError("ftrun submit does not read Hydra's own settings", word, todo)
    if not sweeps:
        return [list(own)]
    parse(own)
    return list(compose.jobs_of(own))


def _checked(verb: str, words: Sequence[str], cluster: ClusterConfig, sweeps: bool) -> Settings:
    """The settings of one run, checked as the verb would; raises ConfigError as it would."""
    launch = [f"launch.processes={processes_of(cluster)}"]
    if cluster.nodes > 1:
        launch += [f"launch.nodes={cluster.nodes}", f"launch.rendezvous={MEETING}"]
    if verb == "select" and not sweeps and len(compose.recipe_names(words)) > 1:
        return check_together(compose.load_each([*words, *launch]))
    composed = compose.load([*words, *launch], verb)
    check_command(verb, composed, words)
    return composed.settings


def _placed(
    settings: Sequence[Settings], jobs: Sequence[list[str]], own: Sequence[str], sweeps: bool, stamp: str
) -> tuple[list[Member], Path]:
    """The runs with a folder each, and the folder of the job as a whole."""
    members = []
    for number, (one, words) in enumerate(zip(settings, jobs, strict=True)):
        rest = [word for word in words if not word.startswith("out=")]
        out = one.out and (str(Path(one.out) / str(number)) if sweeps else one.out)
        name = "several" if "," in str(one.recipe) else one.recipe
        members.append(Member(rest, one.resume or out or str(new_run_folder(name, one.as_dict())), bool(one.resume)))
    places = [member.out for member in members]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice:
        raise ConfigError(f"two runs of the sweep would work in {twice}", f"resume={twice}", "Leave resume= out.")
    if not sweeps:
        return members, Path(members[0].out)
    return members, Path(settings[0].out) if settings[0].out else Path("runs") / ".sweeps" / stamp


def _check_free(member: Member) -> None:
    """Refuse a folder in which the run would be refused, or in which another job is to work."""
    folder = Path(member.out)
    if not member.resumed and holds_work(folder):
        todo = f"Choose another out=DIR, or continue it with resume={folder}."
        raise ConfigError(f"{folder} already holds a run", f"out={folder}", todo)
    before = records.of_folder(folder)
    if before:
        job = before.runs[0].job
        queued = slurm.queue([job]).get(job)
        if queued and not queued.over:
            raise ConfigError(
                f"job {job} works on {folder}: {queued.state.lower()}",
                f"{'resume' if member.resumed else 'out'}={folder}",
                f"Wait for it, or end it first: ftrun cancel {job}.",
            )


def _hand_over(job: Job, script: str, jobs: Sequence[list[str]]) -> dict[str, Any]:
    """Write the script, submit it, and write down which job works where."""
    file = job.folder / "job.sh"
    write_text(file, script)
    try:
        number = slurm.submit(file)
    except FtrunError:
        _take_back(file)
        raise
    runs = [
        Run(f"{number}_{at}" if job.sweeps else number, member.out, _changes(jobs, at) if job.sweeps else [])
        for at, member in enumerate(job.members)
    ]
    command = ["ftrun", "submit", *job.typed]
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    records.remember(Submitted(number, command, str(job.start_in), str(file), now, runs))
    report = Reporter()
    for run in runs[:20]:
        report.note(f"job {run.job}  {' '.join([*run.changes, run.out])}")
    if len(runs) > 20:
        report.note(f"... and {len(runs) - 20} more")
    report.note(f"ftrun status {number} tells how it goes; ftrun cancel {number} ends it")
    return {"job": number, "script": str(file)}


def _take_back(script: Path) -> None:
    """Of a job that was refused, leave nothing: the script, and its folders where they were made for it."""
    script.unlink()
    for folder in (script.parent, script.parent.parent):
        if not any(folder.iterdir()):
            folder.rmdir()


def _changes(jobs: Sequence[list[str]], at: int) -> list[str]:
    """The overrides that not all runs have."""
    return [word for word in jobs[at] if not all(word in job for job in jobs) and not word.startswith("out=")]
