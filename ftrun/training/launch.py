"""Several processes on this machine: started, watched, told to stop, and ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from ftrun.config.settings import LaunchConfig
from ftrun.errors import ConfigError

GRACE_SECONDS = 60.0  # what a process gets to save and leave after the first one has ended badly


def is_worker() -> bool:
    """True inside a process that a launcher started: ours, torchrun or Slurm with its variables set."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def spawn(command: Sequence[str], launch: LaunchConfig) -> int:
    """Run ``command`` once a process and return the exit code: 0, or that of the first process that failed.

    Signals are passed on; when one process dies, the others are asked to stop and then ended.
    """
    if launch.nodes > 1 and not launch.port:
        raise ConfigError("several machines need a fixed port", f"launch.nodes={launch.nodes}", "Set launch.port and launch.address of machine 0 on all of them.")
    port = launch.port or _free_port()
    world = launch.processes * launch.nodes
    workers = []
    for local in range(launch.processes):
        environment = os.environ | {
            "RANK": str(launch.node_rank * launch.processes + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(launch.processes),
            "MASTER_ADDR": launch.address,
            "MASTER_PORT": str(port),
            "TOKENIZERS_PARALLELISM": "false",
        }
        # a session of its own, so that Ctrl-C reaches the workers once, through us
        workers.append(subprocess.Popen([sys.executable, *command], env=environment, start_new_session=True))
    return _watch(workers)


def _watch(workers: list[subprocess.Popen[bytes]]) -> int:
    def forward(number: int, _: FrameType | None) -> None:
        _signal_all(workers, number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        first_bad, since = 0, 0.0
        while any(worker.poll() is None for worker in workers):
            bad = [worker.returncode for worker in workers if worker.returncode]
            if bad and not first_bad:
                first_bad, since = bad[0], time.monotonic()
            if first_bad and time.monotonic() - since > GRACE_SECONDS:
                _signal_all(workers, signal.SIGKILL)
            elif first_bad not in (0, 130, 143) and time.monotonic() - since > 2:
                # a process that waits for a dead one in a collective cannot save anything any more
                _signal_all(workers, signal.SIGKILL)
            time.sleep(0.05)
        codes = [worker.returncode for worker in workers if worker.returncode]
        code = first_bad or (codes[0] if codes else 0)
        return 128 - code if code < 0 else code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _signal_all(workers: list[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
