"""A warm process is a process of its own, as a fresh one is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from warm_processes import Popen, run

PROGRAM = """
import os, sys
print(sys.argv[1:], os.environ.get("MARK"), os.getcwd(), "torch" in sys.modules)
print("complaint", file=sys.stderr)
sys.exit(7)
"""


def test_arguments_environment_folder_streams_and_exit_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run([sys.executable, "-c", PROGRAM, "a", "b"], env={"MARK": "x"}, capture_output=True, text=True)
    assert done.returncode == 7 and done.stderr == "complaint\n"
    assert done.stdout == f"['a', 'b'] x {tmp_path} True\n"
    assert os.environ.get("MARK") is None


def test_modules_run_as_commands():
    done = run([sys.executable, "-m", "ftrun", "trian"], capture_output=True, text=True)
    assert done.returncode == 2 and 'Did you mean "train"?' in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -15), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_signals_reach_it_alone(number, code):
    wait = "try:\n    print('ready', flush=True); import time; time.sleep(60)\nexcept KeyboardInterrupt:\n    raise SystemExit(130)"
    first, second = (Popen([sys.executable, "-c", wait], stdout=subprocess.PIPE, text=True) for _ in range(2))
    assert [process.stdout.readline() for process in (first, second)] == ["ready\n"] * 2
    first.send_signal(number)
    assert first.wait(timeout=30) == code and second.poll() is None
    second.kill()
    assert second.wait(timeout=30) == -signal.SIGKILL


def test_an_error_that_nobody_catches():
    done = run([sys.executable, "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
