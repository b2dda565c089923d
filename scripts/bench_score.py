"""Scoring speed of `superfiltering` or `tshirt` against a plain loop, and how little the batch changes a score.

The loop runs one text at a time, two passes a row (and noisy copy), and takes the loss of the response from the whole
logits. Both add the same noise. Start with `python scripts/bench_score.py --json score.json`, or
`python scripts/bench_score.py --method tshirt --rows 24 --copies 4`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np

ROWS = {"short": "builtin:demo_chat", "long": "builtin:gsm_symbolic:400"}
TURN = 25  # rows
COLUMN = {"superfiltering": "ifd", "tshirt": "s_ifd"}
# name -> (words for `ftrun select`, whether the rows are shuffled)
VARIANTS: dict[str, tuple[list[str], bool]] = {
    "one row a batch": (["select.batch_tokens=1"], False),
    "batches of 512 tokens": (["select.batch_tokens=512"], False),
    "batches of 4096 tokens": (["select.batch_tokens=4096"], False),
    "shuffled": ([], True),
    "2 processes": (["launch.processes=2", "launch.threads=1"], False),
}


def write_rows(file: Path, source: str, count: int) -> float:
    """Write the first rows of a built-in source with an answer of some tokens; mean tokens of prompt and answer."""
    from ftrun.config.settings import ModelConfig
    from ftrun.data.builtin import builtin_rows
    from ftrun.models.load import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig())
    rows, tokens = [], 0
    for row in builtin_rows(source):
        chosen = {key: row.get(key) or "" for key in ("instruction", "input", "output")}
        if len(tokenizer(chosen["output"]).input_ids) < 2 or len(rows) == count:
            continue  # one token alone has nothing to be predicted from
        rows.append(json.dumps(chosen) + "\n")
        tokens += len(tokenizer(" ".join(chosen.values())).input_ids)
    file.write_text("".join(rows))
    return tokens / len(rows)


class PlainLoop:
    """One text at a time with the model as transformers loads it: two passes a row, the loss from the whole logits."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ftrun.models.demo import smollm2_135m

        self.model = AutoModelForCausalLM.from_pretrained(smollm2_135m(), dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_135m())

    def scores(self, rows: list[dict[str, str]]) -> list[float]:
        import torch

        found = []
        with torch.no_grad():
            for row in rows:
                prompt, response = self._ids(row)
                found.append(float(np.exp(self._losses(prompt, response).mean() - self._losses([], response).mean())))
        return found

    def _ids(self, row: dict[str, str]) -> tuple[list[int], list[int]]:
        prompt = "".join(row[key] + "\n" for key in ("instruction", "input") if row[key])
        prompt_ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return prompt_ids, self.tokenizer(row["output"], add_special_tokens=False).input_ids

    def _losses(self, prompt: list[int], response: list[int], noise: np.ndarray | None = None) -> np.ndarray:
        """Losses of the response; ``noise`` (tokens, width) goes onto the embeddings."""
        import torch
        import torch.nn.functional as F

        ids = torch.tensor([prompt + response])
        if noise is None:
            logits = self.model(ids).logits[0, :-1]
        else:
            embeddings = self.model.get_input_embeddings()(ids) + torch.from_numpy(noise)
            logits = self.model(inputs_embeds=embeddings).logits[0, :-1]
        first = max(len(prompt), 1)
        return F.cross_entropy(logits[first - 1 :], ids[0, first:], reduction="none").numpy()


class PlainTshirt(PlainLoop):
    """T-SHIRT's S-IFD in the same loop, copy by copy."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies

    def scores(self, rows: list[dict[str, str]]) -> list[float]:
        import torch

        from ftrun.select.scorers.tshirt import noise

        width = self.model.config.hidden_size
        gaps: list[list[np.ndarray]] = []
        with torch.no_grad():
            for row in rows:
                prompt, response = self._ids(row)
                gaps.append([])
                for copy in range(self.copies):
                    drawn = noise(prompt, response, width, 5.0, (copy, 0))
                    conditional = self._losses(prompt, response, drawn)
                    gaps[-1].append(conditional[1:] - self._losses([], response, drawn[len(prompt) :]))
        tau = np.percentile(np.abs(np.concatenate([gap for copies in gaps for gap in copies])), 50)
        return [float(np.mean([self._selective(gap, float(tau)) for gap in copies])) for copies in gaps]

    @staticmethod
    def _selective(gap: np.ndarray, tau: float) -> float:
        counted = gap[np.abs(gap) > tau]
        return float(np.exp(counted.mean(dtype=np.float64))) if len(counted) else 1.0


class Engine:
    """The same by ftrun's scorer with its default settings; tokenising is timed, loading is not, as in the loop."""

    def __init__(self, folder: Path, threads: int, method: str, words: list[str]) -> None:
        from ftrun.config.settings import LaunchConfig, ModelConfig
        from ftrun.models.load import load_bundle
        from ftrun.runs.progress import Reporter
        from ftrun.training.distributed import Team

        self.folder, self.method, self.words = folder, method, words
        self.team, self.report = Team(LaunchConfig(threads=threads)), Reporter(rank=0)
        self.bundle = load_bundle(ModelConfig(dtype=machine.DTYPE), task="causal", device=self.team.device)

    def scores(self, rows: list[dict[str, str]]) -> list[float]:
        from ftrun.config.compose import load
        from ftrun.data.pool import load_pool
        from ftrun.training.context import Context
        from ftrun.training.scoring import Scoring

        file = self.folder / "chunk.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = load(
            [f"recipe={self.method}", f"data.path={file}", f"model.dtype={machine.DTYPE}", *self.words]
        ).settings
        ctx = Context(settings, self.folder, self.team, self.report)
        ctx.scoring = Scoring(lambda: self.bundle, self.team, self.report, settings.select.batch_tokens)
        scorer = settings.component("select")
        return scorer.score(load_pool(settings.data, self.folder / "data", 0), ctx)[scorer.column].tolist()


def race(file: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and scores of both over the same rows, taking turns every few rows: the machine's moods hit both."""
    import torch

    torch.set_num_threads(options.threads)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    tshirt = options.method == "tshirt"
    words = [f"select.copies={options.copies}"] if tshirt else []
    contenders: dict[str, Any] = {
        "loop": PlainTshirt(options.copies) if tshirt else PlainLoop(),
        "engine": Engine(folder, options.threads, options.method, words),
    }
    found: dict[str, Any] = {name: {"seconds": 0.0, "scores": []} for name in contenders}
    for contender in contenders.values():
        contender.scores(rows[:1])  # the first call of a kernel is slower
    for first in range(0, len(rows), TURN):
        for name, contender in contenders.items():
            started = time.perf_counter()
            found[name]["scores"] += contender.scores(rows[first : first + TURN])
            found[name]["seconds"] += time.perf_counter() - started
    return found


def select(file: Path, words: list[str], out: Path, options: argparse.Namespace) -> np.ndarray:
    """Scores that `ftrun select` writes, by row."""
    import pyarrow.parquet as parquet

    from ftrun.models.demo import smollm2_135m

    command = [sys.executable, "-m", "ftrun", "select", f"recipe={options.method}", f"data.path={file}", "budget=0.5"]
    if options.method == "tshirt":
        words = [*words, f"select.copies={options.copies}"]
    command += [f"model.path={smollm2_135m()}", f"model.dtype={machine.DTYPE}"]
    words = [f"launch.threads={options.threads}", *words]  # of two the later counts
    # a cache of its own: otherwise the second variant would find the first one's scores
    environment = machine.pinned(options.threads) | {"FTRUN_CACHE": str(out.with_suffix(".cache"))}
    with (out.with_suffix(".log")).open("w") as log:
        subprocess.run([*command, *words, f"out={out}"], env=environment, stdout=log, stderr=log, check=True)
    table = parquet.read_table(out / "selection/scores.parquet").to_pydict()
    scores = np.full(len(table["id"]), np.nan)
    scores[np.array(table["id"])] = table[COLUMN[options.method]]
    return scores


def largest(one: Any, other: Any) -> float:
    return float(np.nanmax(np.abs(np.asarray(one) - np.asarray(other))))


def in_own_process(file: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    words = [sys.executable, __file__, "--worker", "race", "--file", str(file), "--folder", str(folder)]
    words += ["--threads", str(options.threads), "--method", options.method, "--copies", str(options.copies)]
    environment = machine.pinned(options.threads)
    subprocess.run(words, env=environment, check=True, stderr=subprocess.DEVNULL)
    return json.loads((folder / "race.json").read_text())


def compare(file: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    found = in_own_process(file, folder, options)
    loop, ours = found["loop"], found["engine"]
    count = len(loop["scores"])
    facts: dict[str, Any] = {
        "rows": count,
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
    reference: np.ndarray | None = None
    for name, (words, shuffled) in VARIANTS.items():
        rows = folder / f"{name.replace(' ', '-')}.jsonl"
        rows.write_text("".join(few[i] for i in order) if shuffled else "".join(few))
        scores = select(rows, words, folder / name.replace(" ", "-"), options)
        if shuffled:
            scores = scores[np.argsort(order)]
        reference = scores if reference is None else reference
        facts["invariance"][name] = largest(scores, reference)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=tuple(COLUMN), default="superfiltering")
    parser.add_argument("--copies", type=int, default=4, help="noisy copies of every row, for tshirt")
    parser.add_argument("--rows", type=int, default=100, help="rows of each kind")
    parser.add_argument("--invariance", type=int, default=60, help="rows of the invariance runs; 0 leaves them out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    for hidden in ("--worker", "--folder", "--file"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        file, folder = Path(options.file), Path(options.folder)
        (folder / "race.json").write_text(json.dumps(race(file, folder, options)))
        return
    ground = machine.facts(options.threads)
    print(machine.header(ground), flush=True)
    facts: dict[str, Any] = {"machine": ground, "method": options.method}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, source in ROWS.items():
            folder = Path(scratch) / kind
            folder.mkdir()
            tokens = write_rows(folder / "rows.jsonl", source, options.rows)
            facts[kind] = {"tokens_per_row": tokens} | compare(folder / "rows.jsonl", folder, options)
            show(kind, facts[kind], ground)
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1))


def show(kind: str, facts: dict[str, Any], ground: dict[str, Any]) -> None:
    print(
        f"{ground['dtype']}, {ground['threads']} threads: {kind} rows, {facts['tokens_per_row']:.0f} tokens each: plain loop {facts['loop_rows_per_s']:.2f} rows/s, "
        f"ftrun {facts['engine_rows_per_s']:.2f} rows/s: {facts['speed_ratio']:.2f}x"
    )
    print(f"  largest difference of a score: {facts['score_difference']:.1e}")
    for name, difference in facts["invariance"].items():
        print(f"  {name}: {difference:.1e}", flush=True)


if __name__ == "__main__":
    main()
