"""What goes wrong inside a process of ftrun, told from outside.

The product has no hooks for this: functions of it are wrapped before its command starts, so that no user can meet one.
`scripts/torture.py` puts a fault into the environment, which the launcher's workers inherit, and calls `arm` first.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "TORTURE_FAULT"
POINTS = {  # where a run can be hurt: module, and the name in it that is wrapped
    "tokenise": ("ftrun.data.prepare", "_Preflight.run"),
    "score a batch": ("ftrun.training.scoring", "Scoring._compute"),
    "write a shard": ("ftrun.training.scoring", "Scoring._write_shard"),
    "write a selection": ("ftrun.select.run", "_write"),
    "keep in the cache": ("ftrun.runs.stagecache", "keep"),
    "begin a step": ("ftrun.training.loop", "Trainer._step"),
    "clip": ("ftrun.training.loop", "Trainer._clip"),
    "update": ("ftrun.training.loop", "Trainer._set_rates"),
    "log a step": ("ftrun.training.loop", "Trainer._log"),
    "write a line": ("ftrun.training.loop", "Trainer._write"),
    "save": ("ftrun.training.checkpoint", "save"),
    "write tensors": ("ftrun.training.checkpoint", "save_file"),
    "write plain state": ("ftrun.training.checkpoint", "_write_plain"),
    "hash a file": ("ftrun.runs.artifacts", "sha256"),
    "write json": ("ftrun.runs.artifacts", "write_json"),
    "rename": ("pathlib", "Path.replace"),
    "delete": ("shutil", "rmtree"),
    "held-out loss": ("ftrun.stages.chain", "heldout_loss"),
    "evaluate": ("ftrun.stages.evaluate", "evaluate_all"),
    "save the result": ("ftrun.stages.train", "save"),
    "close": ("ftrun.stages.recorded", "RecordedRun.close"),
}
CLOCKS = ("time", "monotonic", "perf_counter")


def arm() -> None:
    """Wrap the points of the fault in the environment; every process leaves its number, and what it counted at its end."""
    fault = json.loads(os.environ[VARIABLE])
    folder = Path(fault["notes"])
    (folder / f"{os.getpid()}.pid").touch()
    launches = fault["processes"] > 1 and "RANK" not in os.environ
    rank = int(os.environ.get("RANK", "0"))
    if launches or fault.get("do") is None:
        return
    if fault["do"] == "count":
        _count(folder / f"counts-{rank}.json")
    elif rank == fault.get("rank", 0):
        action = functools.partial(ACTIONS[fault["do"]], fault)
        _wrap(fault["point"], _at(fault["nth"], action, fault.get("after", False)))


def _wrap(point: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, name = POINTS[point]
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, around(getattr(owner, last)))


def _at(nth: int, action: Callable[..., None], after: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """At the nth call, from 1: the action before it, or after it."""

    def around(plain: Callable[..., Any]) -> Callable[..., Any]:
        calls = [0]

        @functools.wraps(plain)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            hit = calls[0] == nth
            if hit and not after:
                action(*args)
            result = plain(*args, **kwargs)
            if hit and after:
                action(*args)
            return result

        return wrapped

    return around


def _count(file: Path) -> None:
    """How often every point is passed, so that a fault can be drawn among the instants that there are."""
    counts: Counter[str] = Counter()
    write = os.write

    def around(point: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[point] += 1
            handle = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            write(handle, json.dumps(counts).encode())
            os.close(handle)
            return plain(*args, **kwargs)

        return wrapped

    for point in POINTS:
        _wrap(point, functools.partial(around, point))


def _signal(number: int, fault: dict[str, Any], *_: Any) -> None:
    os.kill(os.getpid(), number)


def _no_memory(fault: dict[str, Any], *_: Any) -> None:
    import torch

    kinds: list[Callable[[], Exception]] = [
        MemoryError,
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 549755813888 bytes. Error code 12 (Cannot allocate memory)"
        ),
    ]
    raise kinds[fault["variant"]]()


def _no_space(fault: dict[str, Any], *_: Any) -> None:
    raise OSError(28, "No space left on device")


def _not_a_number(fault: dict[str, Any], trainer: Any, *_: Any) -> None:
    have = [p.grad for p in trainer.parameters.values() if p.grad is not None]
    have[fault["variant"] % len(have)].view(-1)[0] = float(("nan", "inf", "-inf")[fault["variant"] % 3])


def _clock(fault: dict[str, Any], *_: Any) -> None:
    """From here on every clock is off by so many seconds; the monotonic ones only forwards, as the system promises."""
    for name in CLOCKS:
        plain, jump = getattr(time, name), fault["seconds"]
        moved = jump if name == "time" else abs(jump)
        setattr(time, name, lambda plain=plain, moved=moved: plain() + moved)


def _read_only(fault: dict[str, Any], *_: Any) -> None:
    """Nobody may make, change or delete names in this folder any more, root neither."""
    subprocess.run(["chattr", "+i", fault["folder"]], check=True)


ACTIONS: dict[str, Callable[..., None]] = {
    "kill": functools.partial(_signal, signal.SIGKILL),
    "term": functools.partial(_signal, signal.SIGTERM),
    "stop": functools.partial(_signal, signal.SIGSTOP),
    "memory": _no_memory,
    "space": _no_space,
    "nan": _not_a_number,
    "clock": _clock,
    "read-only": _read_only,
}


def damage(file: Path, how: str, where: float) -> None:
    """Flip a bit of a file, or cut it off, at this share of its length; or remove it."""
    size = file.stat().st_size
    place = min(int(where * size), max(0, size - 1))
    if how == "remove":
        file.unlink()
    elif how == "truncate" or size == 0:
        os.truncate(file, place)
    else:
        with file.open("r+b") as opened:
            opened.seek(place)
            byte = opened.read(1)[0]
            opened.seek(place)
            opened.write(bytes([byte ^ (1 << int(where * 1e6) % 8)]))
