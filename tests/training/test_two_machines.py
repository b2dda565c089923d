"""Two network namespaces with a cable between them stand for two machines with one process each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from safetensors.numpy import load_file

from ftrun import cli

PORT = 29417
STEPS = 10


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Names of the two namespaces; 10.99.7.1 and 10.99.7.2 are their addresses."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip")
    names = [f"ftrun{os.getpid()}{end}" for end in "ab"]
    links = [f"ft{os.getpid() % 10**6}{end}" for end in "ab"]
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
                pytest.skip("this system lets nobody make network namespaces")
        subprocess.run(["ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1]], check=True)
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            subprocess.run(["ip", "link", "set", link, "netns", name], check=True)
            inside = ["ip", "-n", name]
            subprocess.run([*inside, "addr", "add", f"10.99.7.{number}/24", "dev", link], check=True)
            for device in (link, "lo"):
                subprocess.run([*inside, "link", "set", device, "up"], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_a_machine_is_lost_and_comes_back(machines, tiny_dir, rows_file, tmp_path):
    """One of two is killed and started again: the weights are those of two processes on one machine, bit for bit."""
    words = ["recipe=lora_sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"train.max_steps={STEPS}"]
    words += ["train.save_steps=1", "eval=[]", "launch.threads=1", "data.heldout=0"]
    several = ["launch.nodes=2", f"launch.rendezvous=10.99.7.1:{PORT}", "launch.restarts=2", "launch.timeout=1"]

    def start(name: str, out: str, *more: str) -> subprocess.Popen[str]:
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "ftrun", "train", *words, *more]
        return subprocess.Popen([*command, f"out={tmp_path / out}"], stderr=subprocess.PIPE, text=True)

    assert cli.entry(["train", *words, f"out={tmp_path / 'one'}", "launch.processes=2"]) == 0
    both = [start(name, "two", *several) for name in machines]
    wait_until(lambda: bool(list((tmp_path / "two/train/checkpoints").glob("step-*"))), both)
    worker = subprocess.run(["ps", "-o", "pid=", "--ppid", str(both[1].pid)], capture_output=True, text=True).stdout
    for pid in (int(worker), both[1].pid):  # as when its power fails
        os.kill(pid, signal.SIGKILL)
    both[1].wait()
    both[1] = start(machines[1], "two", *several)
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    assert "resuming from step-" in (tmp_path / "two/ftrun.log").read_text()
    weights = [load_file(tmp_path / out / "adapter/adapter_model.safetensors") for out in ("one", "two")]
    for key in weights[0]:
        np.testing.assert_array_equal(weights[0][key], weights[1][key])


def wait_until(true: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, "it never happened"
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
