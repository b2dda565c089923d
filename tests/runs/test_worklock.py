"""One does the work, the others wait; a dead holder is replaced."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from ftrun.runs import worklock
from ftrun.runs.worklock import WorkLock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in {"BEAT_SECONDS": 0.02, "SILENT_SECONDS": 0.5, "LOOK_SECONDS": 0.005}.items():
        monkeypatch.setattr(worklock, name, seconds)


def test_one_at_a_time(tmp_path):
    inside, most, turns = [], [], []

    def work() -> None:
        for _ in range(5):
            with WorkLock(tmp_path / "a.lock"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.002)
                inside.pop()
                turns.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert max(most) == 1 and len(turns) == 30 and not list(tmp_path.iterdir())


def test_a_process_of_this_machine_that_is_gone_is_replaced_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(worklock, "SILENT_SECONDS", 1000)
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    held_by(tmp_path / "a.lock", pid=ended.pid, host=socket.gethostname(), started=1)
    with WorkLock(tmp_path / "a.lock"):
        pass


def test_a_machine_that_is_silent_is_replaced_and_one_that_beats_is_not(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(worklock, "SAID_AFTER", 0.05)
    path = held_by(tmp_path / "a.lock", pid=7, host="elsewhere", started=1)
    until = time.monotonic() + 1.2

    def beat() -> None:
        while time.monotonic() < until:
            os.utime(path)
            time.sleep(0.02)

    beating = threading.Thread(target=beat)
    beating.start()
    with WorkLock(path, said.append):
        assert time.monotonic() > until
    beating.join()
    assert said == [f"waiting for process 7 on elsewhere, which does the same work ({path.name})"]


def test_a_new_holder_is_not_buried_with_the_old_one(tmp_path):
    """Two saw that a holder was dead; the slower one finds the quicker one's file."""
    path = held_by(tmp_path / "a.lock", pid=8, host="new", started=2)
    before = path.read_text()
    WorkLock(path)._bury("what the old one had written")
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def held_by(path, **holder):
    path.write_text(json.dumps(holder))
    return path
