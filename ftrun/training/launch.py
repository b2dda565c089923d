"""The processes of a run on this machine: how each is started, and what it says when it fails."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ftrun import errors
from ftrun.config.settings import LaunchConfig
from ftrun.errors import ComponentError, ConfigError, FtrunError, ResourceError

GRACE_SECONDS = 60.0  # what a process gets to save and leave after another one was stopped
LOST_SECONDS = 10.0  # ... and after another one failed: it can save nothing any more, only write down the end
ERROR_FILE = "FTRUN_ERROR_FILE"  # where a process that we started leaves its error, so that it is printed once
SET_PARENT_DEATH_SIGNAL = 1  # of Linux' prctl


@dataclass
class Worker:
    rank: int
    process: subprocess.Popen[bytes]
    error_file: Path

    @property
    def code(self) -> int | None:
        return self.process.poll()

    @property
    def error(self) -> FtrunError | None:
        """What it died of: its own words, or those of the system."""
        if not self.code:
            return None
        if self.error_file.exists():
            said = json.loads(self.error_file.read_text())
            error = error_class(said["exit_code"])(said["what"], said["where"], said["todo"])
            error.secondary = said["secondary"]
            return error
        number = -self.code
        if number == signal.SIGKILL:
            todo = "Most often the system has run out of memory: lower train.batch_tokens, use fewer processes or a smaller model."
            return ResourceError(f"process {self.rank} of this run was killed (SIGKILL)", todo=todo)
        if number > 0 and number not in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            return ComponentError(f"process {self.rank} of this run crashed ({signal.Signals(number).name})")
        code = {-signal.SIGINT: 130, -signal.SIGTERM: 143, -signal.SIGUSR1: 143}.get(self.code, self.code)
        return error_class(code)(f"process {self.rank} of this run ended with exit code {code}")


def is_worker() -> bool:
    """True inside a process that a launcher started: ours, torchrun or Slurm with its variables set."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def starts_again() -> bool:
    """True in a process that takes the place of one that was lost: torch's agents count."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def leave_error(error: FtrunError) -> bool:
    """Hand the error to the launcher that started this process; False when there is none, and it must be printed."""
    file = os.environ.get(ERROR_FILE)
    if not file:
        return False
    said = {"what": error.what, "where": error.where, "todo": error.todo, "exit_code": error.exit_code}
    Path(file).write_text(json.dumps(said | {"secondary": error.secondary}))
    return True


def end_now(error: FtrunError) -> None:
    """End this process with an error although it cannot be interrupted."""
    if not leave_error(error) and not error.secondary:
        print(f"ftrun: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)


def error_class(code: int) -> type[FtrunError]:
    """The error that an exit code stands for."""
    kinds: list[type[FtrunError]] = [
        errors.ConfigError,
        errors.DataError,
        errors.ResourceError,
        errors.Interrupted,
        errors.Preempted,
    ]
    return next((kind for kind in kinds if kind.exit_code == code), errors.ComponentError)


def spawn(command: Sequence[str], launch: LaunchConfig, out: str | None = None) -> str | None:
    """Run ``command`` once a process, again after a loss where ``launch.restarts`` allows; returns the run's folder.

    ``out``: the folder, added to the command; several machines take that of the first. Signals are passed on; when one
    process dies, the others get time to write down the end and are then ended. None outlives this call. Raises the error
    of the process that failed first.
    """
    if launch.nodes > 1 and launch.rendezvous is None:
        raise ConfigError(
            f"{launch.nodes} machines need a place to meet",
            f"launch.nodes={launch.nodes}",
            "Add launch.rendezvous=HOST:29500, HOST being one of them, and give all of them this command.",
        )
    from ftrun.training.agent import Agent

    with tempfile.TemporaryDirectory(prefix="ftrun-") as folder:
        agent = Agent(command, launch, out, Path(folder))
        with _passing_signals_on(agent.take_signal):
            return agent.carry_out()


def start(rank: int, command: Sequence[str], environment: dict[str, str], file: Path) -> Worker:
    """One process of a run; it leaves its error in ``file``."""
    common = {"TOKENIZERS_PARALLELISM": "false", ERROR_FILE: str(file)}
    # a session of its own, so that Ctrl-C reaches the workers once, through us
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | environment | common,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    return Worker(rank, process, file)


def _end_with_parent() -> None:
    """In a new process: let it be told to stop when its launcher dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


@contextlib.contextmanager
def _passing_signals_on(take: Callable[[int], None]) -> Iterator[None]:
    def forward(number: int, _: FrameType | None) -> None:
        take(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
