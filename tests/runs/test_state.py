"""How a run is, from its folder alone."""

from __future__ import annotations

import json
import os
import socket
import time

import pytest

from ftrun import cli
from ftrun.runs.artifacts import RunLock
from ftrun.runs.state import holder, holds_work, is_alive, process_start, read_state


@pytest.fixture
def run(tmp_path):
    """A run that training is at work on, held by this process."""
    (tmp_path / "train").mkdir()
    (tmp_path / "config.yaml").write_text("recipe: lora_sft\n")
    (tmp_path / "identity.json").write_text('{"recipe": "lora_sft"}')
    begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - 30))
    log = [f"{begun}  == train  sft", f"{begun}  held-out loss: 0/3 sequences", f"{begun}  training: 1,000/1,400 steps"]
    (tmp_path / "ftrun.log").write_text("\n".join([*log, f"{begun}  ", ""]))
    lines = [json.dumps({"step": step, "loss": 2.0}) for step in (1099, 1100)]
    (tmp_path / "train" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 11')
    with RunLock(tmp_path):
        yield tmp_path


def test_at_work(run):
    """Steps of this start give the pace: 100 in 30 seconds, 300 to go."""
    found = read_state(run)
    assert (found.state, found.recipe, found.step, found.steps, found.loss) == ("running", "lora_sft", 1100, 1400, 2.0)
    assert found.seconds_left == pytest.approx(90, abs=5)
    assert [line.partition("  ")[2] for line in found.log][-1] == "training: 1,000/1,400 steps"
    assert holder(run) == {"pid": os.getpid(), "host": socket.gethostname(), "started": process_start(os.getpid())}


@pytest.mark.parametrize(
    ("changes", "alive", "state"),
    [
        ({}, True, "running"),
        ({"started": 1}, False, "killed"),  # the number belongs to another process now
        ({"pid": 2**22 + 1}, False, "killed"),
        ({"host": "elsewhere"}, None, "running"),
    ],
)
def test_who_holds_it(run, changes, alive, state):
    who = holder(run) | changes
    (run / ".lock").write_text(json.dumps(who))
    assert (is_alive(who), read_state(run).state) == (alive, state)
    old = time.time() - 86400
    for file in (run / "ftrun.log", run / "train" / "metrics.jsonl", run / ".lock"):
        os.utime(file, (old, old))
    assert read_state(run).state == ("unknown" if alive is None else state)


def test_a_refused_second_run_does_not_sign(run):
    """It leaves the name of the one that holds the folder."""
    from ftrun.errors import ConfigError

    before = holder(run)
    with pytest.raises(ConfigError, match="another run"), RunLock(run):
        pass
    assert holder(run) == before


def test_ended(run):
    """What the summary says; a summary that is being written is none."""
    (run / "summary.json").write_text("{")
    assert read_state(run).state == "running"
    summary = {"recipe": "lora_sft", "status": "failed", "steps": 7, "final_loss": None, "error": {"message": "a\n  b"}}
    (run / "summary.json").write_text(json.dumps(summary))
    found = read_state(run)
    assert (found.state, found.step, found.loss, found.error, found.seconds_left) == ("failed", 7, None, "a\n  b", None)
    assert holds_work(run)


def test_status_and_cancel_without_a_cluster(run, capsys, monkeypatch):
    """A folder is told of, its process is told to stop, and one that has ended is left alone."""
    told = []
    monkeypatch.setattr("ftrun.verbs.cancel.os.kill", lambda pid, number: told.append((pid, int(number))))
    assert cli.entry(["status", str(run)]) == 0
    assert "1,100/1,400" in capsys.readouterr().err
    assert cli.entry(["cancel", f"run={run}"]) == 0
    assert (os.getpid(), 15) in told
    (run / "summary.json").write_text('{"status": "done"}')
    told.clear()
    assert cli.entry(["cancel", str(run)]) == 0
    assert not [number for _, number in told if number]
    assert [cli.entry(line) for line in (["status", "none"], ["cancel"], ["cancel", "a", "b"], ["status", "-m"])] == [
        2
    ] * 4
