"""What the reporter says on a terminal, on a pipe and in the log."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ftrun.runs.progress import Reporter

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from ftrun.runs.progress import Reporter
assert "torch" not in sys.modules
report = Reporter()
report.note("early")
report.log_to(Path(sys.argv[1]))
report.stage("Train", "lora_sft")
with report.task("train", 40, "steps") as task:
    for step in range(40):
        task.advance(1, loss=2.0 - step / 100, tokens_per_s=140.0, memory_bytes=2.41e9)
    report.warn("a warning")
report.table("Result", ["metric", "value"], [["loss", 1.5]])
report.close()
print("for machines")
"""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain_reporter(**options) -> tuple[Reporter, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return Reporter(stream=stream, live=False, clock=clock, **options), stream, clock


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("CI", "COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    return kept | {"PYTHONPATH": str(REPOSITORY), "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | more


def run_on_pty(log: Path, **more: str) -> tuple[str, str]:
    """Standard error (a terminal) and standard output (a pipe) of the script."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(log)], stdout=subprocess.PIPE, stderr=terminal, env=environment(**more)
    )
    os.close(terminal)
    seen = b""
    while True:
        try:
            piece = os.read(controller, 65536)
        except OSError:  # Linux says EIO when the last writer has gone
            break
        if not piece:
            break
        seen += piece
    out, _ = process.communicate(timeout=60)
    os.close(controller)
    assert process.returncode == 0, seen.decode()
    return seen.decode(), out.decode()


def test_terminal_gets_a_live_line_and_a_summary(tmp_path):
    seen, out = run_on_pty(tmp_path / "ftrun.log")
    assert out == "for machines\n"
    assert "\x1b[?25l" in seen and "\x1b[?25h" in seen, "the cursor is hidden while the line lives, and given back"
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert "✓ train  40 steps in" in text and "loss 1.6100 · 140 tokens/s · 2.41 GB" in text
    assert "warning: a warning" in text


def test_ci_gets_plain_lines_even_on_a_terminal(tmp_path):
    seen, _ = run_on_pty(tmp_path / "ftrun.log", CI="true")
    assert "\x1b" not in seen


def test_pipe_gets_plain_lines_and_the_log_has_times(tmp_path):
    log = tmp_path / "ftrun.log"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(log)], capture_output=True, text=True, check=False, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "for machines\n"
    assert "\x1b" not in done.stderr and "\r" not in done.stderr
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    said = [line[21:] for line in lines]
    assert said[0] == "early", "what was said before the run folder was known is in the log too"
    assert "warning: a warning" in said and "== Train  lora_sft" in said
    assert any(line.split() == ["loss", "1.5000"] for line in said)


def test_plain_lines_are_few():
    """A line when 10 s have passed, or 10% and a second."""
    report, stream, clock = plain_reporter()
    with report.task("train", 1000, "steps") as task:
        for _ in range(1000):
            clock.now += 0.05  # 10% in 5 s
            task.advance()
    progress = [line for line in stream.getvalue().splitlines() if "%" in line]
    assert len(progress) == 9, "10% to 90%; the summary is the last"
    report, stream, clock = plain_reporter()
    with report.task("slow", 1000) as task:
        for _ in range(10):
            clock.now += 4
            task.advance()
    progress = [line for line in stream.getvalue().splitlines() if "%" in line]
    assert len(progress) == 3, "after 12, 24 and 36 seconds"
    report, stream, clock = plain_reporter()
    with report.task("fast", 10) as task:
        for _ in range(10):
            clock.now += 0.01
            task.advance()
    assert len(stream.getvalue().splitlines()) == 1, "only the summary"


def test_time_left_counts_only_this_run():
    """A resumed task is not credited with the pace of the interrupted one."""
    report, _, clock = plain_reporter()
    with report.task("train", 100, "steps", start=50) as task:
        assert task.seconds_left is None
        clock.now = 10.0
        task.advance(10)
        assert task.seconds_left == pytest.approx(40.0)
        assert task.count == "60/100 steps"


def test_unknown_total_then_known():
    report, stream, clock = plain_reporter()
    with report.task("read", None, "rows") as task:
        clock.now = 11.0
        task.advance(5)
        assert task.seconds_left is None and task.count == "5 rows"
        task.describe(10)
        assert task.seconds_left == pytest.approx(11.0)
    assert "read  5 rows" in stream.getvalue()


def test_piece_of_work_without_an_amount():
    report, stream, clock = plain_reporter()
    with report.task("load model", None):
        clock.now = 1.2
    assert stream.getvalue() == "✓ load model  in 1.2 s\n"


def test_long_step_is_not_silent():
    """Advancing by nothing, as after a micro-batch, is enough for a line every 10 s."""
    report, stream, clock = plain_reporter()
    with report.task("train", 2, "steps") as task:
        for _ in range(6):
            clock.now += 6
            task.advance(0, loss=1.5)
    assert stream.getvalue().count("train    0%  0/2 steps  loss 1.5000") == 3


def test_interrupted_task_says_where_it_stopped():
    report, stream, _ = plain_reporter()
    with pytest.raises(KeyboardInterrupt), report.task("train", 10, "steps") as task:
        task.advance(3)
        raise KeyboardInterrupt
    assert "! train  stopped at 3/10 steps" in stream.getvalue()


def test_warnings_are_remembered_once_and_other_ranks_are_silent(tmp_path):
    report, stream, _ = plain_reporter(rank=1)
    report.log_to(tmp_path / "ftrun.log")
    report.note("nothing")
    report.warn("twice")
    report.warn("twice")
    report.table("t", ["a"], [[1]])
    with report.task("train", 2) as task:
        task.advance(2)
    report.close()
    assert report.warnings == ["twice"]
    assert stream.getvalue() == "" and not (tmp_path / "ftrun.log").exists()
    speaking, stream, _ = plain_reporter()
    speaking.warn("twice")
    speaking.warn("twice")
    assert stream.getvalue().count("twice") == 1


def test_text_of_users_is_not_markup():
    report, stream, _ = plain_reporter()
    report.note("[bold]row[/bold] [/nonsense]")
    report.stage("[red]x", "[/]")
    report.table("[t]", ["[c]"], [["[/c]"]])
    with report.task("[b]", 1) as task:
        task.advance(1, note="[/i]")
    for text in ("[bold]row[/bold] [/nonsense]", "[red]x", "[t]", "[/c]", "[b]", "[/i]"):
        assert text in stream.getvalue()


def test_long_lines_stay_whole_off_a_terminal():
    report, stream, _ = plain_reporter()
    report.note("word " * 200)
    assert stream.getvalue().count("\n") == 1


def test_log_that_cannot_be_written_does_not_end_the_run(tmp_path):
    report, stream, _ = plain_reporter()
    report.log_to(tmp_path / "absent" / "ftrun.log")
    report.note("still here")
    assert "still here" in stream.getvalue()
    assert len(report.warnings) == 1 and "ftrun.log" in report.warnings[0]
