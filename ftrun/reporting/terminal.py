"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ftrun.reporting.changes import Change, Measured
from ftrun.reporting.gain import gain
from ftrun.reporting.run import Run
from ftrun.runs import numbers

if TYPE_CHECKING:
    from ftrun.runs.progress import Reporter

COLOURS = {"better": "green", "worse": "red", "within noise": "dim", "same": "dim", "changed": "", "": "dim"}


def before_after_table(run: Path) -> Table | None:
    """Before, after and change of every metric of a run folder; None when nothing was evaluated."""
    found = Run(Path(run)).changes
    return _table(found) if found else None


def final_table(run: Path) -> RenderableType:
    """What a run ends with: its table, what was gained and how, what it took, and where the report is. For ``Reporter.show``."""
    folder = Run(Path(run))
    parts: list[RenderableType] = [Text("")]
    if folder.changes:
        parts += [_table(folder.changes), Text("")]
    if gained := gain(folder):
        parts += [Text(gained), Text("")]
    if took := _took(folder):
        parts.append(Text(took, "dim"))
    if (folder.path / "report.html").exists():
        parts.append(Text.assemble(("report  ", "dim"), (str(folder.path / "report.html"), "bold")))
    return Group(*parts)


def results_table(run: Path, report: Reporter) -> None:
    """Say what a run ends with, on standard error and in its log."""
    report.show(final_table(run))


def evaluation_table(run: Path, folder: str, report: Reporter) -> None:
    """Say what an evaluation beside a run's own gave; ``folder``: where its results lie, below ``run``."""
    found = Run(Path(run), evaluated_in=folder)
    parts: list[RenderableType] = [Text(""), _table(found.changes), Text("")] if found.changes else []
    place = Text.assemble(("results  ", "dim"), (str(found.path / folder / "results.json"), "bold"))
    report.show(Group(*parts, place))


def _table(found: Sequence[Change]) -> Table:
    compared = any(change.before and change.after for change in found)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("metric", no_wrap=True)
    for name in ("before", "after", "change") if compared else ("value",):
        table.add_column(name, justify="right", no_wrap=True)
    if compared:
        table.add_column("", no_wrap=True)
    for change in found:
        name = Text.assemble((f"{change.evaluator} ", "dim"), change.metric.replace("_", " "))
        if compared:
            colour = COLOURS[change.verdict]
            table.add_row(
                name,
                _value(change.before),
                _value(change.after, "bold"),
                Text(_delta(change), colour),
                Text(change.verdict, colour),
            )
        else:
            table.add_row(name, _value(change.after or change.before, "bold"))
    return table


def _value(side: Measured | None, style: str = "") -> Text:
    if side is None:
        return Text("–", "dim")
    value, error = numbers.pair(side.value, side.stderr)
    return Text.assemble((value, style), (f" ± {error}" if error else "", "dim"))


def _delta(change: Change) -> str:
    if change.delta is None:
        return ""
    return f"{('', '▲ +', '▼ −')[change.direction]}{change.amount}"


def _took(run: Run) -> str:
    summary, parts = run.summary, []
    if isinstance(summary.get("steps"), int) and summary["steps"]:
        parts.append(f"{summary['steps']:,} step{'s' * (summary['steps'] != 1)}")
    if isinstance(summary.get("tokens"), int) and summary["tokens"]:
        parts.append(f"{numbers.quantity(summary['tokens'])} tokens")
    if isinstance(summary.get("wall_s"), int | float):
        parts.append(numbers.duration(summary["wall_s"]))
    if summary.get("peak_memory_bytes"):
        parts.append(f"{numbers.size(summary['peak_memory_bytes'])} at most")
    return " · ".join(parts)
