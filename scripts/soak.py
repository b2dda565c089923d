"""Twenty thousand tiny steps with checkpoints and evaluations: memory, open files and the time of a step must stay flat.

    nice -n 19 python scripts/soak.py --json docs/soak.json --svg docs/soak.svg

The run is one command of ftrun, with its log of metrics, checkpoints and held-out losses; it is watched from outside.
Exit code 1 where something grows from the first to the last quarter by more than `GROWTH` says. About 20 ms a step.
"""

from __future__ import annotations

import argparse
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


def watch(words: list[str], environment: dict[str, str], seconds: float) -> list[dict[str, float]]:
    """Run a command; resident bytes and open files of its process, as often as that. Exits where the command fails."""
    seen: list[dict[str, float]] = []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, "-m", "ftrun", *words], env=environment, stdout=said, stderr=said)
        own = Path(f"/proc/{process.pid}")
        while process.poll() is None:
            try:
                pages, handles = int((own / "statm").read_text().split()[1]), len(list((own / "fd").iterdir()))
            except OSError:
                break  # it has just ended
            seen.append({"at": time.time(), "memory": pages * os.sysconf("SC_PAGE_SIZE"), "open files": handles})
            time.sleep(seconds)
        if process.wait():
            said.seek(0)
            sys.exit(said.read()[-2000:])
    return seen


def curve(seen: list[dict[str, float]], metrics: Path, steps: int) -> dict[str, list[float]]:
    """Memory, open files and seconds a step over the steps, a hundred places each."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, steps + 1)), "steps are missing in metrics.jsonl"
    tokens = np.diff([0, *(line["tokens"] for line in trained)])
    spent = tokens / np.array([line["tokens_per_s"] for line in trained])
    cuts = np.array_split(np.arange(steps), 100)
    held = np.array([line["memory_bytes"] for line in trained])
    # the process is watched by the clock; its steps are told by the time that they took
    own = np.array([row["open files"] for row in seen])
    place = np.linspace(0, len(own) - 1, 100).round().astype(int)
    return {
        "step": [float(cut[-1] + 1) for cut in cuts],
        "memory": [float(np.median(held[cut])) for cut in cuts],
        "open files": [float(count) for count in own[place]],
        "seconds a step": [float(np.median(spent[cut])) for cut in cuts],
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
    seen = watch(words, environment, seconds=1.0)
    return curve(seen, out / "train" / "metrics.jsonl", steps)


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
