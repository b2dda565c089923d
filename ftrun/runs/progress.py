"""What a run tells people while it works: on standard error, and with times in ftrun.log.

On a terminal one live line a running task; elsewhere plain lines, few enough for a log. Standard output stays free.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from ftrun.runs import numbers
from ftrun.scrub import scrub

PLAIN_SECONDS = 10.0  # a plain line at the latest after this time ...
PLAIN_SHARE = 0.1  # ... or after this share of the work,
PLAIN_GAP = 1.0  # but never more often than this
LOG_WIDTH = 120


class Task:
    """A piece of work with a known or unknown amount; created by ``Reporter.task``."""

    def __init__(self, owner: Reporter, name: str, total: float | None, unit: str, start: float):
        self.name, self.total, self.unit = name, total, unit
        self.done = self.start = start
        self.fields: dict[str, Any] = {}
        self._owner = owner
        self._began = self._said = owner.clock()
        self._said_done = start
        self._bar: TaskID | None = None

    def advance(self, n: float = 1, **fields: Any) -> None:
        """``n`` more units are done; ``fields`` (loss, tokens_per_s, memory_bytes ...) stay shown until they change."""
        self.done += n
        self.fields |= fields
        self._owner._advanced(self)

    def describe(self, total: float | None) -> None:
        """Correct the amount of work once it is known."""
        self.total = total
        self._owner._advanced(self)

    @property
    def seconds(self) -> float:
        return self._owner.clock() - self._began

    @property
    def seconds_left(self) -> float | None:
        """Time left at the mean pace so far; None while nothing is known."""
        moved = self.done - self.start
        if self.total is None or moved <= 0 or self.done >= self.total:
            return None
        return self.seconds * (self.total - self.done) / moved

    @property
    def count(self) -> str:
        of = f"/{self.total:,.0f}" if self.total is not None else ""
        unit = self.unit.removesuffix("s") if (self.done if self.total is None else self.total) == 1 else self.unit
        return f"{self.done:,.0f}{of} {unit}".rstrip()

    def phrases(self, left: bool = True) -> str:
        """Time left and fields, separated by dots."""
        parts = [numbers.field(name, value) for name, value in self.fields.items()]
        if left and self.seconds_left is not None:  # first: a narrow terminal cuts off the end
            parts.insert(0, f"{numbers.duration(self.seconds_left)} left")
        return " · ".join(parts)

    def due(self) -> bool:
        """Whether a plain line should be written now; saying yes starts the next interval."""
        now = self._owner.clock()
        share = (self.done - self._said_done) / self.total if self.total else 0.0
        waited = now - self._said
        if self.total is not None and self.done >= self.total:
            return False  # the summary follows
        if waited < PLAIN_SECONDS and (share < PLAIN_SHARE or waited < PLAIN_GAP):
            return False
        self._said, self._said_done = now, self.done
        return True


@dataclass
class Reporter:
    """The one voice of a run. Only rank 0 speaks; the others remember their warnings and say nothing."""

    rank: int = 0
    stream: TextIO | None = None  # None: standard error
    live: bool | None = None  # None: live lines if the stream is a terminal and no CI system is at work
    clock: Callable[[], float] = time.monotonic
    warnings: list[str] = field(default_factory=list)
    on_tick: Callable[[str], None] = lambda where: None  # told of every sign of progress, on every rank

    def __post_init__(self) -> None:
        target = self.stream or sys.stderr
        if self.live is None:
            self.live = target.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
        # without a terminal rich would wrap at 80 columns: lines of a log stay whole
        width = None if self.live else 10_000
        self.console = Console(
            file=self.stream, stderr=True, width=width, force_terminal=self.live, soft_wrap=True, highlight=False
        )
        self._progress: Progress | None = None
        self._log_path: Path | None = None
        self._log: TextIO | None = None
        self._unlogged: list[str] | None = []  # lines said before the run folder is known

    # what a component calls

    def note(self, text: str) -> None:
        """One line of information."""
        self._say(Text(text), text)

    def warn(self, text: str) -> None:
        """Something the user should know; kept for the report, said once however often it recurs."""
        if text in self.warnings:
            return
        self.warnings.append(text)
        self._say(Text.assemble(("warning: ", "bold yellow"), text), f"warning: {text}")

    def stage(self, name: str, detail: str = "") -> None:
        """Headline of a stage."""
        head = Text.assemble("\n", (name, "bold"), (f"  {detail}" if detail else "", "dim"))
        self._say(head, f"== {name}{'  ' + detail if detail else ''}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A small table; columns that hold numbers only are aligned to the right."""
        made = Table(
            title=Text(title, "bold"),
            title_justify="left",
            box=None,
            pad_edge=False,
            header_style="dim",
            padding=(0, 3, 0, 0),
        )
        for position, column in enumerate(columns):
            numeric = bool(rows) and all(isinstance(row[position], int | float) for row in rows)
            made.add_column(Text(column), justify="right" if numeric else "left")
        for row in rows:
            made.add_row(
                *(
                    Text(
                        numbers.plain(cell)
                        if isinstance(cell, float)
                        else f"{cell:,}"
                        if type(cell) is int
                        else str(cell)
                    )
                    for cell in row
                )
            )
        self.show(made)

    def show(self, renderable: RenderableType) -> None:
        """Anything rich can draw, on the screen and as plain text in the log."""
        if self.rank != 0:
            return
        width = self.console.width if self.live else LOG_WIDTH
        self.console.print(renderable, width=width)
        recorder = Console(
            file=None, width=LOG_WIDTH, no_color=True, force_terminal=False, highlight=False, stderr=True
        )
        with recorder.capture() as text:
            recorder.print(renderable)
        for line in scrub(text.get()).rstrip().splitlines():
            self._write_log(line.rstrip())

    @contextmanager
    def task(self, name: str, total: float | None, unit: str = "", start: float = 0) -> Iterator[Task]:
        """Progress of one piece of work; ``start`` is what an earlier, interrupted run has done of it already."""
        task = Task(self, name, total, unit, start)
        self.on_tick(f"{task.name} ({task.count})" if task.count else task.name)
        if self.rank != 0:
            yield task
            return
        self._begin(task)
        finished = False
        try:
            yield task
            finished = True
        finally:
            self._end(task, finished)

    def log_to(self, path: Path) -> None:
        """Append everything, what was said so far included, to this file; it is opened with the first line."""
        self.close_log()
        self._log_path = path
        early, self._unlogged = self._unlogged or [], None
        for line in early:
            self._write_log(line, stamp=False)

    def close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def close(self) -> None:
        """Give the terminal back and close the log; safe to call at any time, also twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self.close_log()

    # the screen

    def _say(self, rich_text: Text, plain: str) -> None:
        if self.rank != 0:
            return
        clean = scrub(plain)
        self.console.print(rich_text if clean == plain else Text(clean), markup=False)
        self._write_log(clean)

    def _begin(self, task: Task) -> None:
        self._write_log(f"{task.name}: {task.count}" if task.total is not None else task.name)
        if not self.live:
            return
        if self._progress is None:
            self._progress = _display(self.console)
            self._progress.start()
        task._bar = self._progress.add_task(task.name, total=task.total, count=task.count, phrases="")
        self._progress.update(task._bar, completed=task.done)

    def _advanced(self, task: Task) -> None:
        self.on_tick(f"{task.name} ({task.count})")
        if self.rank != 0:
            return
        if self._progress is not None and task._bar is not None:
            self._progress.update(
                task._bar, completed=task.done, total=task.total, count=task.count, phrases=task.phrases()
            )
        if task.due():
            share = f"{task.done / task.total:4.0%}  " if task.total else ""
            line = f"  {task.name}  {share}{task.count}  {task.phrases()}".rstrip()
            if not self.live:
                self.console.print(line, markup=False)
            self._write_log(line)

    def _end(self, task: Task, finished: bool) -> None:
        if self._progress is not None and task._bar is not None:
            self._progress.remove_task(task._bar)
            if not self._progress.tasks:
                self._progress.stop()
                self._progress = None
        tick = "✓" if "utf" in (self.console.encoding or "") else "*"
        unit = task.unit.removesuffix("s") if task.done == 1 else task.unit
        amount = f"{task.done:,.0f} {unit}".rstrip() if finished else f"stopped at {task.count}"
        if task.total is None and task.done == task.start:
            amount = "" if finished else "stopped"
        rest = f"{amount} in {numbers.duration(task.seconds)}".strip()
        if task.fields:
            rest += f" · {task.phrases(left=False)}"
        mark, colour = (tick, "green") if finished else ("!", "yellow")
        self._say(Text.assemble((mark, colour), f" {task.name}  ", (rest, "dim")), f"{mark} {task.name}  {rest}")

    # the log

    def _write_log(self, line: str, stamp: bool = True) -> None:
        if self.rank != 0:
            return
        if stamp:
            line = f"{datetime.now().isoformat(sep=' ', timespec='seconds')}  {line}"
        if self._unlogged is not None:
            self._unlogged.append(line)
            return
        if self._log_path is None:
            return
        try:
            if self._log is None:
                self._log = self._log_path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
            self._log.write(line + "\n")
        except OSError as error:
            # a full disk must end the run where it saves something that matters, not here
            path, self._log_path, self._log = self._log_path, None, None
            self.warn(f"{path} cannot be written any more: {error.strerror}")


def _display(console: Console) -> Progress:
    """One line a task: name, bar, count, and the fields, cut off where the terminal ends."""
    cut = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return Progress(
        TextColumn(" {task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(
            bar_width=24 if console.width >= 100 else 12,
            style="bright_black",
            complete_style="cyan",
            pulse_style="cyan",
        ),
        TextColumn("{task.fields[count]}", markup=False, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[phrases]}", style="dim", markup=False, table_column=cut),
        console=console,
        refresh_per_second=4,
        transient=True,
        redirect_stdout=False,  # standard output belongs to --json
        expand=True,
    )
