"""How a run is, as its folder tells while it works and after."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

OUTPUTS = ("selection", "train", "eval", "adapter", "model")  # what a run computes, as against what it says of itself
SILENT_SECONDS = 900.0  # a run on another machine that has written nothing for so long is not said to run
LOG_LINES = 8
STAMP = len("2026-01-31 12:00:00")
_BEGAN = re.compile(r"^(\S+ \S+)  .*: ([\d,]+)/([\d,]+) steps$", re.MULTILINE)


@dataclass
class RunState:
    """A run at this moment. ``state`` is a summary's status, or running, killed (no end was written down) or unknown."""

    out: str
    recipe: str | None = None
    state: str = "unknown"
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    seconds_left: float | None = None  # of the training
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    log: list[str] = field(default_factory=list)  # the last lines of ftrun.log


def holds_run(folder: Path) -> bool:
    """Whether a run has begun here."""
    return (folder / "config.yaml").is_file()


def holds_work(folder: Path) -> bool:
    """Whether a run has left results here; one that was refused before it computed anything leaves only its record."""
    if any((folder / name).exists() for name in OUTPUTS):
        return True
    try:
        return json.loads((folder / "summary.json").read_text())["status"] != "failed"
    except FileNotFoundError:
        return False
    except (ValueError, KeyError):
        return True


def read_state(folder: Path, lines: int = LOG_LINES) -> RunState:
    """The state of the run in ``folder``."""
    found = RunState(str(folder), recipe=_json(folder / "identity.json").get("recipe"))
    summary = _json(folder / "summary.json")
    log = _text(folder / "ftrun.log")
    found.log = [line for line in log.splitlines() if line[STAMP:].strip()][-lines:]
    latest = _last_line(folder / "train" / "metrics.jsonl")
    found.step, found.loss = latest.get("step", 0), latest.get("loss")
    begun = list(_BEGAN.finditer(log))
    if begun:
        found.steps = int(begun[-1][3].replace(",", ""))
    if summary:
        found.state, found.recipe = summary.get("status", "unknown"), summary.get("recipe")
        found.step, found.loss = summary.get("steps", 0), summary.get("final_loss")
        found.metrics = summary.get("metrics") or {}
        found.error = (summary.get("error") or {}).get("message")
        return found
    found.state = _unfinished(folder)
    if begun and found.state == "running":
        found.seconds_left = _left(begun[-1], found, folder)
    return found


def holder(folder: Path) -> dict[str, Any]:
    """Who writes into a run folder, or did last: ``pid``, the process that takes signals for it; ``host``; ``started``."""
    return _json(folder / ".lock")


def is_alive(who: dict[str, Any]) -> bool | None:
    """Whether that process is there; None where it belongs to another machine."""
    if not who:
        return False
    if who.get("host") != socket.gethostname():
        return None
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process_start(who["pid"]) == who.get("started")


def process_start(pid: int) -> int | None:
    """When a process began, in ticks since the machine did, so that its number given to another tells; None off Linux."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def _unfinished(folder: Path) -> str:
    who = holder(folder)
    alive = is_alive(who)
    if alive is None:
        return "running" if time.time() - _touched(folder) < SILENT_SECONDS else "unknown"
    return "running" if alive else "killed" if who else "unknown"


def _left(begun: re.Match[str], found: RunState, folder: Path) -> float | None:
    """Seconds that the remaining steps will take, at the mean pace of those since the training began or went on."""
    first, total = int(begun[2].replace(",", "")), int(begun[3].replace(",", ""))
    if not first < found.step < total:
        return None
    now = (folder / "train" / "metrics.jsonl").stat().st_mtime
    pace = (now - datetime.fromisoformat(begun[1]).timestamp()) / (found.step - first)
    return max(pace * (total - found.step) - (time.time() - now), 0.0)


def _touched(folder: Path) -> float:
    files = [folder / "ftrun.log", folder / "train" / "metrics.jsonl", folder / ".lock"]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def _json(file: Path) -> dict[str, Any]:
    """What a file holds; nothing where it is missing or being written."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _last_line(file: Path) -> dict[str, Any]:
    """The last whole line of a file of JSON lines."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(opened.seek(0, os.SEEK_END) - (1 << 16), 0))
            lines = opened.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and "step" in found:
                return found
    return {}
