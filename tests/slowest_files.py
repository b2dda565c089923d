"""Where the seconds of the suite go: its slowest files, told at the end of every run."""

from __future__ import annotations

from collections import Counter
from typing import Any

SHOWN = 10


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The files with the most seconds, set-up and teardown included, and the sum of all."""
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "when"):
                file = report.nodeid.partition("::")[0]
                seconds[file] += report.duration
                tests[file] += report.when == "call"
    if len(seconds) < 2:
        return
    terminalreporter.section(f"{SHOWN} slowest of {len(seconds)} files, {seconds.total():.0f} test-seconds in all")
    for file, spent in seconds.most_common(SHOWN):
        terminalreporter.write_line(f"{spent:7.1f} s  {tests[file]:4} tests  {file}")
