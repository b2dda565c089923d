"""What was submitted: which job works on which run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftrun.runs.artifacts import write_json

JOBS = Path("runs") / ".jobs"  # a file a job, found by its id
INSIDE = Path("cluster")  # below a run folder, or below a sweep's: the script, and what Slurm writes
NOTE = INSIDE / "job.json"  # in a run folder: its newest job


@dataclass(frozen=True)
class Run:
    """One run of a job."""

    job: str  # 17, or 17_3 in an array
    out: str
    changes: list[str]  # the overrides that no other run of the job has


@dataclass(frozen=True)
class Submitted:
    """A job as it was submitted."""

    job: str
    command: list[str]
    start_in: str  # run folders are relative to it
    script: str
    submitted: str  # time, as ISO 8601 writes it
    runs: list[Run]

    @property
    def array(self) -> bool:
        return self.runs[0].job != self.job

    def folder(self, run: Run) -> Path:
        """Where a run lies, from wherever one asks."""
        place = Path(self.start_in) / run.out
        here = Path.cwd()
        return place.relative_to(here) if place.is_relative_to(here) else place


def remember(submitted: Submitted) -> None:
    """Write the record of a job, and a note of it into every run folder."""
    plain = asdict(submitted)
    for run in submitted.runs:
        write_json(submitted.folder(run) / NOTE, plain | {"runs": [asdict(run)]})
    write_json(Path(submitted.start_in) / JOBS / f"{submitted.job}.json", plain)


def of_job(job: str) -> Submitted | None:
    """The record of a job, or of an element's array; None where it was not submitted from this folder."""
    return _read(JOBS / f"{job.partition('_')[0]}.json")


def of_folder(folder: Path) -> Submitted | None:
    """The newest job that works on this run; None where there is none."""
    return _read(folder / NOTE)


def known() -> Iterator[Submitted]:
    """Every job that was submitted from this folder, the newest first."""
    files = [file for file in JOBS.glob("*.json") if file.stem.isdecimal()]
    yield from filter(None, map(_read, sorted(files, key=lambda file: int(file.stem), reverse=True)))


def _read(file: Path) -> Submitted | None:
    try:
        plain: dict[str, Any] = json.loads(file.read_text())
        runs = [Run(**run) for run in plain.pop("runs")]
        return Submitted(**plain, runs=runs)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return None  # of another version, or cut off: the run folder still tells how the run is
