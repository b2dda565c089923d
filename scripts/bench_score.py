"""Scoring speed of `superfiltering` against a plain loop, and how little the batch changes a score.

The loop runs one text at a time, two passes a row, and takes the loss of the response from the whole logits. Start with
`python scripts/bench_score.py --json score.json`.
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

ROWS = "builtin:gsm_symbolic:{}"
# name -> (words for `ftrun select`, whether the rows are shuffled)
VARIANTS: dict[str, tuple[list[str], bool]] = {
    "one row a batch": (["select.batch_tokens=1"], False),
    "batches of 512 tokens": (["select.batch_tokens=512"], False),
    "batches of 4096 tokens": (["select.batch_tokens=4096"], False),
    "shuffled": ([], True),
    "2 processes": (["launch.processes=2", "launch.threads=1"], False),
}


def write_rows(file: Path, count: int) -> None:
    from ftrun.data.builtin import builtin_rows

    rows = builtin_rows(ROWS.format(count))
    file.write_text("".join(json.dumps({k: row[k] for k in ("instruction", "input", "output")}) + "\n" for row in rows))


def plain_loop(file: Path, threads: int) -> dict[str, Any]:
    """Scores and seconds of the loop, the model as transformers loads it."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftrun.models.demo import smollm2_135m

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(smollm2_135m(), dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_135m())
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    def loss(prompt: list[int], response: list[int]) -> float:
        ids = torch.tensor([prompt + response])
        logits = model(ids).logits[0, :-1]
        first = max(len(prompt), 1)
        return F.cross_entropy(logits[first - 1 :], ids[0, first:]).item()

    scores, started = [], time.perf_counter()
    with torch.no_grad():
        for row in rows:
            prompt = "".join(row[key] + "\n" for key in ("instruction", "input") if row[key])
            prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
            response_ids = tokenizer(row["output"], add_special_tokens=False).input_ids
            scores.append(np.exp(loss(prompt_ids, response_ids)) / np.exp(loss([], response_ids)))
    return {"seconds": time.perf_counter() - started, "scores": scores}


def engine(file: Path, threads: int, folder: Path) -> dict[str, Any]:
    """The same by ftrun's scorer with its default settings; tokenising is timed, loading is not, as in the loop."""
    from ftrun.config.compose import load
    from ftrun.config.settings import LaunchConfig
    from ftrun.context import Context
    from ftrun.data.pool import load_pool
    from ftrun.models.load import load_bundle
    from ftrun.select.scoring import Scoring
    from ftrun.training.distributed import Team
    from ftrun.training.progress import Reporter

    settings = load(["recipe=superfiltering", f"data.path={file}"]).settings
    team, report = Team(LaunchConfig(threads=threads)), Reporter(rank=0)
    ctx = Context(settings, folder, team, report)
    pool = load_pool(settings.data, folder / "data", 0)
    bundle = load_bundle(settings.model, task="causal", device=team.device)
    ctx.scoring = Scoring(lambda: bundle, team, report, settings.select.batch_tokens)
    started = time.perf_counter()
    columns = settings.component("select").score(pool, ctx)
    return {"seconds": time.perf_counter() - started, "scores": columns["ifd"].tolist()}


def select(file: Path, words: list[str], out: Path) -> np.ndarray:
    """Scores that `ftrun select` writes, by row."""
    import pyarrow.parquet as parquet

    from ftrun.models.demo import smollm2_135m

    command = [sys.executable, "-m", "ftrun", "select", "recipe=superfiltering", f"data.path={file}", "budget=0.5"]
    command += [f"model.path={smollm2_135m()}"]
    # a cache of its own: otherwise the second variant would find the first one's scores
    environment = os.environ | {"FTRUN_CACHE": str(out.with_suffix(".cache"))}
    with (out.with_suffix(".log")).open("w") as log:
        subprocess.run([*command, *words, f"out={out}"], env=environment, stdout=log, stderr=log, check=True)
    table = parquet.read_table(out / "selection/scores.parquet").to_pydict()
    scores = np.full(len(table["id"]), np.nan)
    scores[np.array(table["id"])] = table["ifd"]
    return scores


def largest(one: Any, other: Any) -> float:
    return float(np.nanmax(np.abs(np.asarray(one) - np.asarray(other))))


def in_own_process(name: str, file: Path, folder: Path, threads: int) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    words = [sys.executable, __file__, "--worker", name, "--file", str(file), "--folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([*words, "--threads", str(threads)], env=environment, check=True, stderr=subprocess.DEVNULL)
    return json.loads((folder / f"{name}.json").read_text())


def compare(file: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    loop = in_own_process("loop", file, folder, options.threads)
    ours = in_own_process("engine", file, folder, options.threads)
    count = len(loop["scores"])
    facts: dict[str, Any] = {
        "rows": count,
        "threads": options.threads,
        "loop_rows_per_s": count / loop["seconds"],
        "engine_rows_per_s": count / ours["seconds"],
        "speed_ratio": loop["seconds"] / ours["seconds"],
        "score_difference": largest(loop["scores"], ours["scores"]),
        "invariance": {},
    }
    if not options.invariance:
        return facts
    few = file.read_text().splitlines(keepends=True)[: options.invariance]
    order = np.random.default_rng(0).permutation(len(few))
    for name, (words, shuffled) in VARIANTS.items():
        rows = folder / f"{name.replace(' ', '-')}.jsonl"
        rows.write_text("".join(few[i] for i in order) if shuffled else "".join(few))
        scores = select(rows, words, folder / name.replace(" ", "-"))
        if shuffled:
            scores = scores[np.argsort(order)]
        facts["invariance"][name] = largest(scores, ours["scores"][: len(few)])
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--invariance", type=int, default=60, help="rows of the invariance runs; 0 leaves them out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    for hidden in ("--worker", "--folder", "--file"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        file, folder = Path(options.file), Path(options.folder)
        result = (
            plain_loop(file, options.threads) if options.worker == "loop" else engine(file, options.threads, folder)
        )
        (folder / f"{options.worker}.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(folder / "rows.jsonl", options.rows)
        facts = compare(folder / "rows.jsonl", folder, options)
    print(
        f"plain loop {facts['loop_rows_per_s']:.2f} rows/s, ftrun {facts['engine_rows_per_s']:.2f} rows/s: {facts['speed_ratio']:.2f}x"
    )
    print(f"largest difference of a score: {facts['score_difference']:.1e}")
    for name, difference in facts["invariance"].items():
        print(f"  {name}: {difference:.1e}")
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
