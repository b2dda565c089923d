"""A process that hangs is named by those that wait for it; one that is slow is left in peace."""

from __future__ import annotations

import pytest

from ftrun.config.settings import LaunchConfig
from ftrun.errors import ComponentError
from ftrun.training import launch

PROGRAM = """
import os, signal, sys, time
from ftrun import cli
from ftrun.config.settings import LaunchConfig
from ftrun.training.distributed import Team
def work(line):
    team = Team(LaunchConfig(processes=2, threads=1, device="cpu", timeout=0.05))
    if team.rank:
        for step in range(10):  # longer than the timeout, with signs of progress
            team.alive(f"training ({{step}}/20 steps)")
            time.sleep(0.5)
        with team.at_work("a library"):
            time.sleep(4)
        team.alive("training (12/20 steps)")
    team.barrier()
    open({file!r}, "a").write("met\\n")
    if team.rank:
        {hang}
    team.barrier()
cli.dispatch = work
sys.exit(cli.entry(["train"]) or 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "hang", ["time.sleep(60)", "time.sleep(1); os.kill(os.getpid(), signal.SIGSTOP)"], ids=["waits", "stopped"]
)
def test_a_hung_process_is_named(hang, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "LOST_SECONDS", 0.5)
    file = tmp_path / "met"
    with pytest.raises(ComponentError) as caught:
        launch.spawn(["-c", PROGRAM.format(file=str(file), hang=hang)], LaunchConfig(processes=2, timeout=0.5))
    assert file.read_text() == "met\nmet\n"
    assert "process 1 on " in caught.value.what and "has not reached a barrier after" in caught.value.what
    assert "for 0.05 minutes; it was last in training (12/20 steps)" in caught.value.what
