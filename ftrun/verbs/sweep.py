"""The jobs of a sweep: each in a folder of its own, and a table of what they gave."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.config.explain import parse
from ftrun.config.settings import Settings
from ftrun.errors import ConfigError, FtrunError
from ftrun.runs.artifacts import write_json
from ftrun.scrub import scrubbed

METRICS = 4  # columns of the table that show metrics


@dataclass(frozen=True)
class Sweep:
    """What a sweep's jobs share. A launcher may run them in other processes, so each leaves a file in ``records``."""

    said: tuple[str, ...]  # the keys whose values all jobs share
    out: str | None  # the folder that was named for all of them
    records: Path

    @classmethod
    def of(cls, overrides: Sequence[str]) -> Sweep:
        """Raises ConfigError where ``out`` holds runs already: said before the first job."""
        shared = [override for override in parse(overrides) if not override.is_sweep_override()]
        out = next((str(one.value()) for one in shared if one.key_or_group == "out" and one.value()), None)
        taken = [
            name for name in ("config.yaml", "summary.json", "sweep.json", "0") if out and (Path(out) / name).exists()
        ]
        if taken:
            raise ConfigError(f"{out} already holds runs", f"out={out}", "Choose another folder with out=DIR.")
        folder = Path(out) if out else Path("runs")
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        return cls(tuple(one.key_or_group for one in shared), out, (folder / ".sweeps" / stamp).resolve())

    def place(self, settings: Settings, number: int) -> None:
        """Give job ``number`` its folder below the one that was named for all."""
        if self.out:
            settings.out = str(Path(self.out) / str(number))

    def record(
        self, number: int, words: Sequence[str], result: dict[str, Any] | None, error: FtrunError | None = None
    ) -> None:
        """Note down how job ``number`` with these overrides ended."""
        found = result or {}
        metrics = {name: values for name, values in (found.get("metrics") or {}).items() if name != "before"}
        entry = {
            "job": number,
            "changes": [word for word in words if word.partition("=")[0].lstrip("+") not in self.said],
            "status": "done" if error is None else "failed",
            "exit_code": error.exit_code if error else 0,
            "final_loss": found.get("final_loss"),
            "metrics": metrics,
            "out": found.get("out") or (str(Path(self.out) / str(number)) if self.out else None),
        } | ({"error": error.what} if error else {})
        write_json(self.records / f"{number}.json", scrubbed(entry))

    def finish(self) -> int:
        """Print the table of all jobs and return the exit code: that of the first that failed, else 0."""
        files = sorted(self.records.glob("*.json"), key=lambda file: int(file.stem))
        entries = [json.loads(file.read_text()) for file in files]
        if not entries:
            return 0
        if self.out:
            write_json(Path(self.out) / "sweep.json", scrubbed(entries))
        _print(entries)
        return next((entry["exit_code"] for entry in entries if entry["exit_code"]), 0)


def _print(entries: Sequence[dict[str, Any]]) -> None:
    from ftrun.runs.progress import Reporter

    measured: dict[tuple[str, str], None] = {}
    for entry in entries:
        measured |= {(name, next(iter(values))): None for name, values in entry["metrics"].items() if values}
    shown = list(measured)[:METRICS]
    rows = [
        [
            str(entry["job"]),
            " ".join(entry["changes"]),
            entry["status"],
            _number(entry["final_loss"]),
            *(_number(entry["metrics"].get(name, {}).get(metric)) for name, metric in shown),
            entry["out"] or "",
        ]
        for entry in entries
    ]
    heads = ["job", "", "status", "final loss", *(f"{name} {metric}".replace("_", " ") for name, metric in shown), ""]
    failed = sum(entry["exit_code"] != 0 for entry in entries)
    title = f"sweep: {len(entries)} job{'s' * (len(entries) != 1)}" + (f", {failed} failed" if failed else "")
    report = Reporter()
    report.table(title, heads, rows)
    for entry in entries:
        if "error" in entry:
            report.note(f"job {entry['job']} failed: {entry['error']}")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"
