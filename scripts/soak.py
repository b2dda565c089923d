"""Twenty thousand tiny steps with checkpoints and evaluations: memory, open files and the time of a step must stay flat.

    nice -n 19 python scripts/soak.py --json docs/soak.json --svg docs/soak.svg

The run is one command of ftrun, with its log of metrics, checkpoints and held-out losses; it is watched from outside.
The time of a step is the processor's, checkpoints and evaluations included: other work on the machine does not count.
Exit code 1 where something grows from the second to the last quarter by more than `GROWTH` says. About 12 ms a step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SCRIPTS = Path(__file__).resolve().parent
STEPS, EVERY = 20_000, 200  # steps; between two checkpoints, and between two held-out losses
GROWTH = {"memory": 0.05, "open files": 0.0, "seconds a step": 0.15}  # from the median of one quarter to another's
UNITS = {"memory": "MB", "open files": "", "seconds a step": "ms"}


def watch(words: list[str], environment: dict[str, str], metrics: Path, seconds: float) -> list[dict[str, float]]:
    """Run a command, and look at its process as often as that from its first step on. Exits where the command fails."""
    seen: list[dict[str, float]] = []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, "-m", "ftrun", *words], env=environment, stdout=said, stderr=said)
        while process.poll() is None:
            time.sleep(seconds)
            step = last_step(metrics)
            if step and (seen[-1]["step"] if seen else 0) < step:
                with contextlib.suppress(OSError):  # it has just ended
                    seen.append({"step": step, **look(Path(f"/proc/{process.pid}"))})
        if process.wait():
            said.seek(0)
            sys.exit(said.read()[-2000:])
    return seen


def look(process: Path) -> dict[str, float]:
    """Resident memory, open files and the seconds of processor that a process has used."""
    ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
    return {
        "memory": int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "open files": len(list((process / "fd").iterdir())),
        "seconds": sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
    }


def last_step(metrics: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 while there is none."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 2000))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def curve(seen: list[dict[str, float]]) -> dict[str, list[float]]:
    """Memory, open files and processor seconds a step over the steps, at most a hundred places."""
    pieces = [piece for piece in np.array_split(np.array([list(row.values()) for row in seen]), 100) if len(piece)]
    ends = np.array([piece[-1] for piece in pieces])
    steps, spent = np.diff(ends[:, 0]), np.diff(ends[:, 3])
    return {
        "step": ends[1:, 0].tolist(),
        "memory": [float(np.median(piece[:, 1])) for piece in pieces[1:]],
        "open files": [float(np.median(piece[:, 2])) for piece in pieces[1:]],
        "seconds a step": (spent / steps).tolist(),
    }


def growth(values: list[float]) -> float:
    """From the second to the last quarter, as a share: the first quarter may still warm up."""
    quarter = len(values) // 4
    before, after = np.median(values[quarter : 2 * quarter]), np.median(values[-quarter:])
    return float(after / before - 1)


def picture(values: dict[str, list[float]]) -> str:
    """Three lines over the steps, each from zero, as SVG."""
    width, height, gap = 640, 90, 34
    parts = []
    for number, name in enumerate(GROWTH):
        line, top = values[name], number * (height + gap) + gap
        scale = {"memory": 1e-6, "seconds a step": 1e3}.get(name, 1.0)
        highest = max(line) or 1.0
        points = " ".join(
            f"{40 + (width - 60) * step / values['step'][-1]:.1f},{top + height * (1 - value / highest / 1.1):.1f}"
            for step, value in zip(values["step"], line, strict=True)
        )
        last = f"{line[-1] * scale:.3g} {UNITS[name]}".strip()
        parts += [
            f'<text x="40" y="{top - 8}">{name}: {last} at the end, {growth(line):+.1%} from the second to the last quarter</text>',
            f'<line x1="40" y1="{top + height}" x2="{width - 20}" y2="{top + height}" stroke="#999"/>',
            f'<polyline points="{points}" fill="none" stroke="#0b62a4" stroke-width="1.5"/>',
        ]
    total = len(GROWTH) * (height + gap) + gap
    parts.append(f'<text x="40" y="{total - 10}">step 0 to {values["step"][-1]:,.0f}</text>')
    style = "<style>text{font:12px sans-serif;fill:#555}</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{total}">{style}{"".join(parts)}</svg>\n'


def soak(folder: Path, steps: int, every: int) -> dict[str, list[float]]:
    """One run in this folder, and its curve."""
    sys.path.insert(0, str(SCRIPTS))
    from bench_pool import make_model, make_pool

    make_model(folder / "model")
    make_pool(folder / "rows.jsonl", 200)
    out = folder / "run"
    words = ["train", "recipe=lora_sft", "adapter.r=2", f"model.path={folder / 'model'}", f"out={out}"]
    words += [f"data.path={folder / 'rows.jsonl'}", "data.heldout=0.02", "eval=[heldout]", "launch.threads=1"]
    words += [
        f"train.max_steps={steps}",
        "train.batch_size=1",
        f"train.save_steps={every}",
        f"train.eval_steps={every}",
    ]
    environment = os.environ | {"FTRUN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    metrics = out / "train" / "metrics.jsonl"
    values = curve(watch(words, environment, metrics, seconds=0.2))
    trained = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert trained == list(range(1, steps + 1)), "steps are missing in metrics.jsonl"
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--every", type=int, default=EVERY, help="steps between two checkpoints and two held-out losses"
    )
    parser.add_argument("--json", type=Path, help="write the curve here")
    parser.add_argument("--svg", type=Path, help="draw the curve here")
    options = parser.parse_args()
    from ftrun.runs.lockfile import processor

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        values = soak(Path(scratch), options.steps, options.every)
    grown = {name: growth(values[name]) for name in GROWTH}
    told: dict[str, Any] = {
        "machine": f"{processor()}, one thread",
        "steps": options.steps,
        "seconds": round(time.monotonic() - started),
        "growth": {name: round(share, 4) for name, share in grown.items()},
        "curve": {name: [float(f"{value:.6g}") for value in line] for name, line in values.items()},
    }
    for name, share in grown.items():
        print(f"{name:15} {share:+.2%} from the second to the last quarter, at most {GROWTH[name]:+.0%}")
    if options.json:
        options.json.write_text(json.dumps(told) + "\n")
    if options.svg:
        options.svg.write_text(picture(values))
    sys.exit(any(share > GROWTH[name] for name, share in grown.items()))


if __name__ == "__main__":
    main()
