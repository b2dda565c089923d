"""Time and memory of the pickers on made-up scores and embeddings of 10 thousand to a million rows.

Every measurement is a process of its own. Start with `python scripts/bench_pick.py --json pick.json`.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np

PICKERS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "kmeans_random": {},
    "kmq": {},
    "facility_location": {"method": "stochastic"},
    "k_center": {"method": "blocks"},
}
SIZES = [10_000, 100_000, 1_000_000]
TOPICS = 200  # groups that the embeddings form
MADE_AT_ONCE = 65_536


class Rows:
    """What pickers ask of a pool when embeddings are there: the content hashes of its rows."""

    def __init__(self, count: int) -> None:
        self.hashes = np.random.default_rng(1).integers(0, 2**63, count, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self.hashes)


def made_up_embeddings(count: int, width: int) -> np.ndarray:
    """Unit vectors around the centres of topics of unequal size, (count, width) float32."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((TOPICS, width), dtype=np.float32)
    vectors = np.empty((count, width), np.float32)
    for at in range(0, count, MADE_AT_ONCE):
        part = vectors[at : at + MADE_AT_ONCE]
        random.standard_normal(part.shape, dtype=np.float32, out=part)
        part += centres[(TOPICS * random.random(len(part)) ** 2).astype(np.int64)]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def pick(name: str, count: int, width: int, share: float) -> dict[str, Any]:
    """Seconds of one choice, rows picked, and the most memory that the process held, bytes."""
    import torch

    from ftrun import registry
    from ftrun.config.settings import LaunchConfig, Settings
    from ftrun.runs.progress import Reporter
    from ftrun.select.base import Budget, Table
    from ftrun.training.context import Context
    from ftrun.training.distributed import Team
    from ftrun.training.scoring import Scoring

    team, report = Team(LaunchConfig(threads=torch.get_num_threads())), Reporter(stream=io.StringIO(), live=False)
    settings = Settings(slots={"select": ("none", {}), "picker": (name, PICKERS[name])})
    ctx = Context(settings, Path("."), team, report)

    def no_model() -> Any:
        raise RuntimeError("a picker with embeddings needs no model")

    ctx.scoring = Scoring(no_model, team, report)
    vectors = made_up_embeddings(count, width)
    scores = np.random.default_rng(2).normal(size=count)
    pool: Any = Rows(count)
    table = Table({"score": scores}, np.full(count, 100), pool, embeddings=vectors)
    chooser = registry.build("picker", name, PICKERS[name])
    started = time.perf_counter()
    picked = chooser.pick(table, np.arange(count), "score", Budget(rows=int(share * count)), ctx)
    seconds = time.perf_counter() - started
    assert len(set(picked.tolist())) == int(share * count)
    return {
        "picker": name,
        "knobs": PICKERS[name],
        "rows": count,
        "picked": len(picked),
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "input_bytes": vectors.nbytes,
    }


def in_own_process(name: str, count: int, options: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, __file__, "--worker", name, "--sizes", str(count)]
    words += ["--width", str(options.width), "--share", str(options.share)]
    done = subprocess.run(words, env=machine.pinned(options.threads), stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="rows")
    parser.add_argument("--pickers", nargs="+", default=list(PICKERS), choices=list(PICKERS))
    parser.add_argument("--width", type=int, default=384, help="of the embeddings")
    parser.add_argument("--share", type=float, default=0.05, help="of the rows that is picked")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(pick(options.worker, options.sizes[0], options.width, options.share)))
        return
    facts: list[dict[str, Any]] = []
    ground = machine.facts(options.threads)
    print(machine.header(ground), flush=True)
    print(
        f"{'picker':<20}{'rows':>12}{'picked':>10}{'seconds':>10}{'ratio':>8}{'peak GB':>9}{'of it input':>13}{'dtype, threads':>18}"
    )
    for name in options.pickers:
        before: dict[str, Any] | None = None
        for count in sorted(options.sizes):
            found = in_own_process(name, count, options)
            found["ratio"] = found["seconds"] / before["seconds"] if before else None
            facts.append(found)
            show(found, ground)
            before = found
            if options.json:  # a long benchmark that is stopped keeps what it has
                options.json.write_text(json.dumps({"machine": ground, "measured": facts}, indent=1))


def show(found: dict[str, Any], ground: dict[str, Any]) -> None:
    ratio = f"{found['ratio']:.1f}x" if found["ratio"] else ""
    print(
        f"{found['picker']:<20}{found['rows']:>12,}{found['picked']:>10,}{found['seconds']:>10.2f}{ratio:>8}"
        f"{found['peak_bytes'] / 1e9:>9.2f}{found['input_bytes'] / 1e9:>13.2f}"
        f"{ground['dtype'] + ', ' + str(ground['threads']):>18}",
        flush=True,
    )


if __name__ == "__main__":
    main()
