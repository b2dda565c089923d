"""Processes that have already imported what every command imports.

A fresh ``python -m ftrun`` spends seconds on the imports of torch, transformers and peft before it does its first line of
work, and tests of signals, of kills and of several processes start hundreds of them. Here one server a test worker pays for
the imports once and forks every process from itself: a process of its own, with its own arguments, environment, folder,
streams, signals and exit code, in a fraction of a second. The server has run no computation, so there are no threads to
lose in a fork. What a process finds different from a fresh one: modules are there already, and libraries that read the
environment when they are imported have read the server's. Tests of imports and of such variables start a fresh one.

``Popen`` and ``run`` take the words of their namesakes in ``subprocess``; the launcher's workers come through here too.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import pytest

_forked = False  # in a process that was started here; it has no threads yet and may fork its own workers


class Popen:
    """A warm process that runs ``python -m MODULE ...`` or ``python -c PROGRAM ...``."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        text: bool = False,
        start_new_session: bool = False,
        preexec_fn: Callable[[], None] | None = None,
    ):
        assert command[0] == sys.executable and command[1] in ("-m", "-c"), f"cannot be started warm: {command}"
        self.args = list(command)
        self.stdout, output = _stream(stdout, 1, text)
        self.stderr, complaints = _stream(stderr, 2, text)
        context = multiprocessing.get_context("fork" if _forked else "forkserver")
        if not _forked:
            _start_server()
        self._process = context.Process(
            target=_become,
            args=(self.args[1:], dict(os.environ if env is None else env), os.getcwd(), output, complaints),
            kwargs={"new_session": start_new_session, "first": preexec_fn},
        )
        self._process.start()
        output.close()
        complaints.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the number of the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """What it printed, after its end."""
        printed: dict[int, Any] = {}

        def read(number: int, stream: IO[Any]) -> None:
            printed[number] = stream.read()

        streams = {number: stream for number, stream in ((1, self.stdout), (2, self.stderr)) if stream is not None}
        readers = [threading.Thread(target=read, args=pair, daemon=True) for pair in streams.items()]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return printed.get(1), printed.get(2)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def run(
    command: Sequence[str], *, capture_output: bool = False, text: bool = False, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[Any]:
    """Run a command to its end."""
    kept = subprocess.PIPE if capture_output else None
    process = Popen(command, env=env, stdout=kept, stderr=kept, text=text)
    printed, complaints = process.communicate()
    return subprocess.CompletedProcess(process.args, process.wait(), printed, complaints)


def start_workers_warm() -> None:
    """Let the launcher start its workers here."""
    from ftrun.training import launch

    launch.subprocess = types.SimpleNamespace(Popen=Popen)  # type: ignore[assignment]


def use_one_thread() -> None:
    """Let runs of this process find one core."""
    os.sched_getaffinity = lambda pid: {0}


@functools.cache
def _start_server() -> None:
    """The server imports warm_server, which lies beside this file, and the ftrun that is tested."""
    tests = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, [tests, tests.parent, *sys.path])))
        forkserver.set_forkserver_preload(["warm_server"])
        forkserver.ensure_running()


def _stream(wanted: int | None, number: int, text: bool) -> tuple[IO[Any] | None, Connection]:
    """Our end of a stream, and the end that the process gets."""
    if wanted == subprocess.PIPE:
        ours, theirs = os.pipe()
        raw = os.fdopen(ours, "rb")
        return (io.TextIOWrapper(raw) if text else raw), Connection(theirs, readable=False)
    if wanted == subprocess.DEVNULL:
        return None, Connection(os.open(os.devnull, os.O_WRONLY), readable=False)
    if wanted is not None and wanted >= 0:
        return None, Connection(os.dup(wanted), readable=False)
    return None, Connection(os.dup(number if wanted is None else wanted), readable=False)


def _become(
    words: list[str],
    environment: dict[str, str],
    folder: str,
    output: Connection,
    complaints: Connection,
    new_session: bool,
    first: Callable[[], None] | None,
) -> None:
    """In the new process: turn into the command."""
    global _forked
    _forked = True
    for number, stream in ((1, output), (2, complaints)):
        os.dup2(stream.fileno(), number)
        stream.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    if new_session:
        os.setsid()
    if first is not None:
        first()
    start_workers_warm()
    use_one_thread()
    if before := os.environ.get("WARM_BEFORE"):  # a program that prepares the process: its workers inherit it
        exec(compile(before, "<before>", "exec"), {})
    kind, what, *rest = words
    if kind == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
