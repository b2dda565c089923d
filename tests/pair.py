"""Two processes of a run that stay alive: tests hand them command lines instead of starting two processes each."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import signal
import socket
import sys
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from warm_processes import Popen

PATIENCE = 180  # seconds; a command line of a tiny model takes two


class Pair:
    """Runs a command line as both processes of one group."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._workers: list[tuple[Popen, Connection]] = []

    def run(self, *argv: str) -> None:
        """Carry out ``ftrun ARGV`` in both. Raises AssertionError with what they printed where it does not end with 0."""
        code, printed = self.outcome(*argv)
        assert code == 0, printed

    def outcome(self, *argv: str) -> tuple[int, str]:
        """The exit code, and what both printed on standard error."""
        if not self._workers:
            self._workers = [self._start(rank) for rank in range(2)]
        port = free_port()
        for _, connection in self._workers:
            connection.send(([*argv, "launch.processes=2", "launch.threads=1"], port, dict(os.environ)))
        answers: list[tuple[int, str]] = []
        for process, connection in self._workers:
            if not connection.poll(PATIENCE):
                printed = "".join(text for _, text in answers)
                ended = process.poll()
                process.send_signal(signal.SIGUSR2)  # it says where it is
                time.sleep(1)
                self.close()
                raise AssertionError(f"a process hangs, or has ended with {ended}; the other one said: {printed}")
            answers.append(connection.recv())
        codes = {code for code, _ in answers}
        if codes != {0}:
            self.close()  # one may wait for the other
        return max(codes), "".join(text for _, text in answers)

    def close(self) -> None:
        for process, connection in self._workers:
            process.kill()
            process.wait()
            connection.close()
        self._workers = []

    def _start(self, rank: int) -> tuple[Popen, Connection]:
        address = str(self._folder / f"{rank}.socket")
        Path(address).unlink(missing_ok=True)
        program = f"import pair; pair.serve({address!r})"
        paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = dict(os.environ) | ranks | {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": paths}
        with Listener(address, "AF_UNIX") as listener:
            process = Popen([sys.executable, "-c", program], env=environment)
            return process, listener.accept()


def serve(address: str) -> None:
    """In a worker: carry out command lines until the test process is gone."""
    faulthandler.register(signal.SIGUSR2, file=sys.__stderr__)
    with Client(address, "AF_UNIX") as connection:
        while True:
            try:
                argv, port, environment = connection.recv()
            except EOFError:
                return
            os.environ.update({key: environment[key] for key in ("FTRUN_CACHE",) if key in environment})
            os.environ["MASTER_PORT"] = str(port)
            connection.send(_carried_out(argv))


def _carried_out(argv: list[str]) -> tuple[int, str]:
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from ftrun import cli

    printed: Any = io.StringIO()
    with contextlib.redirect_stderr(printed):
        code = cli.entry(argv)
    if dist.is_initialized():
        dist.destroy_process_group()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return code, printed.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
