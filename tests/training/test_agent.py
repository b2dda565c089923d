"""The launcher starts a lost group again, and only a lost one; machines that were not given one command do not meet."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from warm_processes import Popen

from ftrun.config.settings import LaunchConfig
from ftrun.errors import ConfigError, DataError, FtrunError
from ftrun.training import launch

PROGRAM = """
import os, sys, time
from ftrun import cli, errors
rank, attempt = int(os.environ['RANK']), int(os.environ['TORCHELASTIC_RESTART_COUNT'])
open({file!r}, 'a').write(f'{{attempt}} {{rank}}\\n')
def work(line): {what}
cli.dispatch = work
sys.exit(cli.entry(['train']) or 0)
"""
KILLED = "time.sleep(60) if rank == 0 and not attempt else os.kill(os.getpid(), 9) if not attempt else None; return 0"
MISTAKE = "raise errors.DataError('row 3 is empty')"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("what", "attempts", "error"), [(KILLED, 2, None), (MISTAKE, 1, DataError)], ids=["killed", "mistake"]
)
def test_only_what_can_end_otherwise_starts_again(what, attempts, error, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(launch, "LOST_SECONDS", 0.2)
    file = tmp_path / "started"
    command = ["-c", PROGRAM.format(file=str(file), what=what)]
    caught: list[FtrunError] = []
    try:
        launch.spawn(command, LaunchConfig(processes=2, restarts=3))
    except FtrunError as problem:
        caught.append(problem)
    assert [type(one) for one in caught] == ([error] if error else [])
    assert sorted(file.read_text().split("\n"))[1:] == [f"{at} {rank}" for at in range(attempts) for rank in (0, 1)]
    assert ("starting again from the newest checkpoint (1 of 3)" in capfd.readouterr().err) == (attempts > 1)


def test_several_machines_name_their_meeting_point():
    with pytest.raises(ConfigError, match="2 machines need a place to meet") as caught:
        launch.spawn(["-c", ""], LaunchConfig(nodes=2))
    assert "launch.rendezvous=HOST:29500" in caught.value.todo


def test_a_machine_that_never_comes_is_told_with_the_address():
    port = free_port()
    with pytest.raises(FtrunError, match=f"2 machines did not all meet at 127.0.0.1:{port} within"):
        launch.spawn(["-c", ""], LaunchConfig(nodes=2, rendezvous=f"127.0.0.1:{port}", timeout=0.03))


@pytest.mark.slow
def test_a_lost_process_does_not_change_the_weights(tiny_dir, rows_file, tmp_path):
    """SIGKILL to one of two workers: the group forms again in the same folder and goes on from its checkpoint."""
    words = ["recipe=lora_sft", f"model.path={tiny_dir}", f"data.path={rows_file}", "train.max_steps=12", "eval=[]"]
    words += ["train.save_steps=1", "launch.processes=2", "launch.threads=1", "launch.restarts=2"]
    for name in ("whole", "cut"):
        command = [sys.executable, "-m", "ftrun", "train", *words, f"out={tmp_path / name}"]
        process = Popen(command, stderr=subprocess.PIPE, text=True)
        if name == "cut":
            killer = threading.Thread(target=kill_a_worker, args=(process, tmp_path / "cut"))
            killer.start()
            killer.join()
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert "starting again from the newest checkpoint" in said and "resuming from step-" in said
    assert json.loads((tmp_path / "cut/summary.json").read_text())["steps"] == 12
    weights = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "cut")]
    assert all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])


def kill_a_worker(process: Popen, out: Path) -> None:
    import os
    import time

    while not list((out / "train/checkpoints").glob("step-*")):
        assert process.poll() is None, "the run ended before a worker could be killed"
        time.sleep(0.02)
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), 9)
