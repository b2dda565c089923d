"""How long the light commands take, and that they leave torch alone: `python scripts/bench_start.py --json start.json`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

COMMANDS = {
    "ftrun --help": ["--help"],
    "ftrun recipes": ["recipes"],
    "a mistyped key": ["train", "recipe=qlora_sft", "adapter.rank=4"],
    "an unknown recipe": ["train", "recipe=qlora_stf"],
}
HEAVY = ("torch", "transformers", "peft", "datasets")

# runs the command line in this process and tells, whatever way it ended, which heavy packages it had imported
DRIVER = f"""
import sys
from ftrun.cli import main
sys.argv[0] = "ftrun"
try:
    main()
finally:
    print("imported:", *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def seconds(words: list[str], folder: Path, times: int) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Wall time of a command, the best of ``times``, and its last run."""
    best, ended = float("inf"), None
    for _ in range(times):
        started = time.perf_counter()
        ended = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, env=dict(os.environ))
        best = min(best, time.perf_counter() - started)
    assert ended is not None
    return best, ended


def measure(times: int) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, words in (("python -c pass", "pass"), ("python -c 'import torch'", "import torch")):
            taken, _ = seconds([sys.executable, "-c", words], folder, times)
            lines.append({"command": name, "seconds": taken, "imported": None, "exit_code": 0})
        for name, words in COMMANDS.items():
            taken, _ = seconds([sys.executable, "-m", "ftrun", *words], folder, times)
            _, seen = seconds([sys.executable, "-c", DRIVER, *words], folder, 1)
            imported = seen.stderr.rpartition("imported:")[2].split()
            lines.append({"command": name, "seconds": taken, "imported": imported, "exit_code": seen.returncode})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="runs of each command; the best counts")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    ground = machine.facts(machine.usable_cores(), None)
    print(machine.header(ground), flush=True)
    lines = measure(options.times)
    for line in lines:
        heavy = "" if line["imported"] is None else f"imported: {', '.join(line['imported']) or 'nothing heavy'}"  # type: ignore[arg-type]
        print(f"{line['command']:26} {line['seconds']:6.2f} s  exit code {line['exit_code']}  {heavy}")
    if options.json:
        options.json.write_text(json.dumps({"machine": ground, "commands": lines}, indent=1))


if __name__ == "__main__":
    main()
