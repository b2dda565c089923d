"""``ftrun status``: how runs are, those of jobs and those started by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from ftrun.cluster import records, slurm
from ftrun.cluster.records import INSIDE, Run, Submitted
from ftrun.cluster.slurm import WAITING, Queued
from ftrun.errors import ComponentError, ConfigError
from ftrun.runs import numbers
from ftrun.runs.progress import Reporter
from ftrun.runs.state import RunState, holds_run, read_state

SHOWN = 30  # runs that the table without an argument holds
ENDS = {"CANCELLED": "cancelled", "TIMEOUT": "timeout", "NODE_FAIL": "node failed", "OUT_OF_MEMORY": "failed"}


@dataclass
class Told:
    """One run with the job that works on it."""

    run: RunState
    job: str | None = None
    job_state: str | None = None  # in Slurm's words; None where it knows the job no more
    reason: str = ""
    limit_seconds_left: int | None = None  # until the job's time limit
    changes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        return plain.pop("run") | plain


def status(what: str | None) -> dict[str, Any]:
    """Print how the named run or job is, or all of them; returns the same. Raises ConfigError where there is no such."""
    if what is None:
        found = _everything()
        _table(found[:SHOWN], "runs")
        if len(found) > SHOWN:
            Reporter().note(f"... and {len(found) - SHOWN} older ones: ftrun status RUN tells of one")
    else:
        found = told(what)
        _one(found[0]) if len(found) == 1 else _table(found, what)
    return {"runs": [one.as_dict() for one in found]}


def told(what: str) -> list[Told]:
    """The runs of a job, or in a folder. Raises ConfigError where there is none."""
    submitted, runs = find(what)
    if submitted:
        return _of_jobs([(submitted, run) for run in runs])
    folder = Path(what).expanduser()
    below = [folder] if holds_run(folder) else sorted(file.parent for file in folder.glob("*/config.yaml"))
    pairs = [_newest(place) for place in below]
    return _of_jobs([pair for pair in pairs if pair]) if all(pairs) else [_with_job(place) for place in below]


def find(what: str) -> tuple[Submitted | None, list[Run]]:
    """The job that a word names, by its id or by its folder, and the runs of it that are meant.

    None for a folder that no job works on. Raises ConfigError where there is neither a job nor a run.
    """
    number, _, element = what.partition("_")
    if number.isdecimal() and (not element or element.isdecimal()) and not holds_run(Path(what)):
        submitted = records.of_job(what)
        runs = [run for run in submitted.runs if not element or run.job == what] if submitted else []
        if not submitted or not runs:
            todo = "Ask where it was submitted, or give the folder of its run."
            raise ConfigError(f"no job {what} was submitted from this folder", f"ftrun status {what}", todo)
        return submitted, runs
    folder = Path(what).expanduser()
    submitted = records.of_folder(folder) or _of_sweep(folder)
    if submitted:
        return submitted, submitted.runs
    if holds_run(folder) or any(folder.glob("*/config.yaml")):
        return None, []
    raise ConfigError(
        f"there is no run in {folder}", what, "Give the folder of a run, or the id of a job; ftrun status lists them."
    )


def _of_sweep(folder: Path) -> Submitted | None:
    """The job whose script lies below this folder, that of a sweep."""
    script = (folder / INSIDE / "job.sh").resolve()
    return next((one for one in records.known() if Path(one.script).resolve() == script), None)


def _everything() -> list[Told]:
    """Every run below runs/, and every job that was submitted from here; the newest first."""
    folders = {
        file.parent.resolve()
        for file in Path("runs").glob("*/*/config.yaml")
        if not file.parent.parent.name.startswith(".")
    }
    jobs: list[tuple[Submitted, Run]] = []
    for submitted in records.known():
        for run in submitted.runs:
            place = submitted.folder(run).resolve()
            newest = records.of_folder(place)
            if newest is None or newest.runs[0].job == run.job:  # an older job of the same run says nothing
                jobs.append((submitted, run))
                folders.discard(place)
    found = [*_of_jobs(jobs), *(Told(read_state(_near(folder))) for folder in folders)]
    return sorted(found, key=lambda one: _age(Path(one.run.out)), reverse=True)


def _near(folder: Path) -> Path:
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _age(folder: Path) -> float:
    files = [folder / "config.yaml", folder / records.NOTE]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def _newest(folder: Path) -> tuple[Submitted, Run] | None:
    submitted = records.of_folder(folder)
    return (submitted, submitted.runs[0]) if submitted else None


def _with_job(folder: Path) -> Told:
    pair = _newest(folder)
    return _of_jobs([pair])[0] if pair else Told(read_state(folder))


def _of_jobs(pairs: Sequence[tuple[Submitted, Run]]) -> list[Told]:
    try:
        queued = slurm.queue([run.job for _, run in pairs])
    except ComponentError as error:
        Reporter().warn(f"{error.what}; what follows is what the folders say")
        queued = {}
    return [combine(read_state(submitted.folder(run)), run, queued.get(run.job)) for submitted, run in pairs]


def combine(run: RunState, of: Run, queued: Queued | None) -> Told:
    """A run as its folder and Slurm tell of it together: which of the two knows better depends on where the job is."""
    found = Told(run, of.job, changes=of.changes)
    if queued is None:
        if run.state == "unknown" and run.step == 0 and not run.log:
            run.state = "never ran"  # ended before it began, and Slurm has forgotten why
        return found
    found.job_state, found.reason = queued.state, queued.reason
    if queued.state in WAITING:
        run.state, run.seconds_left = "queued", None
    elif not queued.over:
        run.state, found.limit_seconds_left = "running", queued.seconds_left
    elif run.state in ("preempted", "killed", "unknown", "running"):
        # running: on another machine, where the folder tells nothing of the end
        run.state, run.seconds_left = ENDS.get(queued.state, "failed" if run.state != "preempted" else run.state), None
    return found


def _table(found: Sequence[Told], title: str) -> None:
    report = Reporter()
    if not found:
        report.note("no runs below runs/, and no jobs that were submitted from here")
        return
    changed = any(one.changes for one in found)
    measured = _measured(found)
    heads = [
        "run",
        "job",
        *([""] if changed else []),
        "state",
        "step",
        "loss",
        "left",
        *(f"{a} {b}" for a, b in measured),
    ]
    rows = [
        [
            one.run.out,
            one.job or "–",
            *([" ".join(one.changes)] if changed else []),
            one.run.state,
            _steps(one.run),
            _number(one.run.loss),
            _duration(one.run.seconds_left),
            *(_number((one.run.metrics.get(name) or {}).get(metric)) for name, metric in measured),
        ]
        for one in found
    ]
    report.table(title, heads, rows)


def _measured(found: Sequence[Told], limit: int = 3) -> list[tuple[str, str]]:
    """The first metric of each evaluator, where the runs are those of one sweep."""
    if not any(one.changes for one in found):
        return []
    names: dict[tuple[str, str], None] = {}
    for one in found:
        names |= {
            (name, next(iter(values))): None for name, values in one.run.metrics.items() if values and name != "before"
        }
    return list(names)[:limit]


def _one(one: Told) -> None:
    """All that is known of one run, a line each, and the end of its log."""
    report = Reporter()
    for name, value in _facts(one):
        report.show(Text.assemble((f"{name:<8}", "dim"), value))
    if one.run.error:
        report.show(Text(one.run.error, "yellow"))
    for line in one.run.log:
        report.show(Text(line, "dim"))


def _facts(one: Told) -> Iterator[tuple[str, str]]:
    run = one.run
    yield "run", run.out
    if run.recipe:
        yield "recipe", run.recipe
    if one.job:
        said = (
            f"{one.job_state.lower()}{f' ({one.reason})' if one.reason else ''}"
            if one.job_state
            else "not in the queue"
        )
        yield "job", f"{one.job}  {said}"
    yield "state", run.state
    yield "step", _steps(run)
    if run.loss is not None:
        yield "loss", _number(run.loss)
    if run.seconds_left is not None:
        yield "left", f"{_duration(run.seconds_left)} of training"
    if one.limit_seconds_left is not None:
        yield "limit", f"in {_duration(one.limit_seconds_left)}"


def _steps(run: RunState) -> str:
    return f"{run.step:,}" + (f"/{run.steps:,}" if run.steps else "")


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "–"


def _duration(value: float | None) -> str:
    return numbers.duration(value) if value is not None else "–"
