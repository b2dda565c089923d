"""Several processes on this machine: started, watched, told to stop, and ended together."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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


def leave_error(error: FtrunError) -> bool:
    """Hand the error to the launcher that started this process; False when there is none, and it must be printed."""
    file = os.environ.get(ERROR_FILE)
    if not file:
        return False
    said = {"what": error.what, "where": error.where, "todo": error.todo, "exit_code": error.exit_code}
    Path(file).write_text(json.dumps(said | {"secondary": error.secondary}))
    return True


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


def spawn(command: Sequence[str], launch: LaunchConfig) -> None:
    """Run ``command`` once a process. Raises the error of the process that failed first.

    Signals are passed on; when one process dies, the others get time to write down the end and are then ended. None
    outlives this call.
    """
    if launch.nodes > 1:
        raise ConfigError(
            "several machines need a fixed port",
            f"launch.nodes={launch.nodes}",
            "Set launch.port and launch.address of machine 0 on all of them.",
        )
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="ftrun-") as folder, _passing_signals_on(workers):
        try:
            _start(command, launch, Path(folder), workers)
            failed = _watch(workers)
        finally:
            _signal_all(workers, signal.SIGKILL)
            for worker in workers:
                worker.process.wait()
        found = [error for worker in failed if (error := worker.error)]
    if found:
        # a process that lost another one says less than that other
        raise next((error for error in found if not error.secondary), found[0])


def _start(command: Sequence[str], launch: LaunchConfig, folder: Path, workers: list[Worker]) -> None:
    port = _free_port()
    world = launch.processes * launch.nodes
    for local in range(launch.processes):
        rank = local
        file = folder / f"{rank}.json"
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(launch.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TOKENIZERS_PARALLELISM": "false",
            ERROR_FILE: str(file),
        }
        # a session of its own, so that Ctrl-C reaches the workers once, through us
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, start_new_session=True, preexec_fn=_end_with_parent
        )
        workers.append(Worker(rank, process, file))


def _end_with_parent() -> None:
    """In a new process: let it be told to stop when its launcher dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


@contextlib.contextmanager
def _passing_signals_on(workers: list[Worker]) -> Iterator[None]:
    def forward(number: int, _: FrameType | None) -> None:
        _signal_all(workers, number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(workers: list[Worker]) -> list[Worker]:
    """Wait for all to end; those that failed by themselves, the first one first."""
    failed: list[Worker] = []
    since = 0.0
    while any(worker.code is None for worker in workers):
        _note_failed(workers, failed)
        if failed and not since:
            since = time.monotonic()
        stopped = bool(failed) and failed[0].code in (130, 143, -signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR1)
        if failed and time.monotonic() - since > (GRACE_SECONDS if stopped else LOST_SECONDS):
            return failed
        time.sleep(0.05)
    _note_failed(workers, failed)
    return failed


def _note_failed(workers: list[Worker], failed: list[Worker]) -> None:
    failed += [worker for worker in workers if worker.code and worker not in failed]


def _signal_all(workers: list[Worker], number: int) -> None:
    for worker in workers:
        if worker.code is None:
            worker.process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
