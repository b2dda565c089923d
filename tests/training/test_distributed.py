"""What the processes of a run know of each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import torch

from ftrun.config.settings import LaunchConfig
from ftrun.training.distributed import Team

PROGRAM = """
import torch
from ftrun.config.settings import LaunchConfig
from ftrun.training.distributed import Team
team = Team(LaunchConfig(processes=2, threads=3))
print(team.rank, torch.get_num_threads())
team.barrier()
"""


def test_processes_use_the_threads_that_were_asked_for():
    """Accelerate sets a number of its own where the environment names none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    inherited = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    common = inherited | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, worker in enumerate(workers):
        printed, complaints = worker.communicate(timeout=240)
        assert printed.split() == [str(rank), "3"], complaints
        assert "OMP_NUM_THREADS" not in complaints


def test_the_environment_says_how_many_threads(monkeypatch):
    """As long as launch.threads does not."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        for asked, taken in ((None, 1), (2, 2), (None, 1)):
            Team(LaunchConfig(threads=asked)).close()
            assert torch.get_num_threads() == taken
    finally:
        torch.set_num_threads(before)
