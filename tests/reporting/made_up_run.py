"""A run folder as a real run leaves it, made up: for tests, and by hand to look at the report.

python -m tests.reporting.made_up_run FOLDER
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

CONFIG = """\
recipe: qlora_sft
paper:
  title: 'QLoRA: Efficient Finetuning of Quantized LLMs'
  authors: Dettmers et al.
  year: 2023
  arxiv: '2305.14314'
fidelity: reference-checked
differences:
- double quantisation uses blocks of 256 scales, as the library does
- LoRA dropout is 0.05 for every model size
task: causal
budget: 0.25
seed: 0
stages: [select, train, eval]
model: {path: 'builtin:smollm2_135m', dtype: auto}
data: {path: 'builtin:gsm_symbolic:1000', max_length: 2048, overlong: auto}
train: {max_steps: 240, batch_size: 8, batch_tokens: 4096}
select: {name: superfiltering, picker: {name: top_k}}
tokens: {name: token_cleaning, share: 0.6}
adapter: {name: lora, r: 8, alpha: 16}
quant: {name: nf4, double: true}
objective: {name: sft}
optim: {name: adamw, learning_rate: 0.0002}
schedule: {name: cosine, warmup: 0.03}
eval: {heldout: {}, generation: {limit: 64}}
"""
NAMES = ["Amira", "Björn", "Chen", "Dalia", "Emeka", "Farah", "Goran", "Hana", "Ines", "Jonas"]
THINGS = ["marbles", "pencils", "tickets", "apples", "stamps", "shells", "candles", "buttons"]
LETTER = (
    "Write a short, polite letter to a neighbour whose dog barks through the night. Mention that you like the dog, "
    "that the baby wakes up from the noise, and suggest meeting at the weekend to find a way together."
)
REPLY = (
    "Dear neighbour,\n\nI hope you are well. We are fond of Bello, who always greets us at the gate. Lately he has been "
    "barking between two and four at night, and our baby wakes up each time.\n\nWould you have time for a coffee on "
    "Saturday, so that we can think of something together?\n\nKind regards\nfrom next door"
)


def problem(rng: random.Random, index: int) -> dict[str, Any]:
    a, b, name, thing = rng.randint(3, 40), rng.randint(2, 19), rng.choice(NAMES), rng.choice(THINGS)
    if index % 9 == 4:
        return {"instruction": LETTER, "input": "", "output": REPLY}
    if index % 7 == 3:
        return {
            "instruction": f"Name three uses of {thing}.",
            "input": "",
            "output": "Play." if index % 2 else f"Counting, trading, and as a gift for {name}.",
        }
    question = (
        f"{name} has {a} {thing} and gets {b} more from each of 3 friends. How many {thing} does {name} have now?"
    )
    extra = "".join(
        f" On day {d} {name} also counts the {rng.choice(THINGS)} in the shop."
        for d in range(2, 2 + int(rng.expovariate(0.5)))
    )
    question = question.replace(" How many", f"{extra} How many")
    answer = f"Three friends give 3 × {b} = {3 * b} {thing}.\nTogether with the first {a} that makes {a} + {3 * b} = {a + 3 * b}.\n#### {a + 3 * b}"
    return {"question": question, "answer": answer}


def make(folder: Path, steps: int = 240, rows: int = 600) -> Path:
    """Fill ``folder`` and return it."""
    for name in ("train", "eval/predictions/before", "selection"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng, np_rng = random.Random(7), np.random.default_rng(7)
    (folder / "config.yaml").write_text(CONFIG)
    _json(folder / "lock.json", _lock())
    _json(folder / "summary.json", _summary(steps))
    _lines(folder / "train/metrics.jsonl", _metrics(rng, steps))
    _evaluation(folder / "eval", rng)
    _selection(folder / "selection", rng, np_rng, rows)
    (folder / "ftrun.log").write_text(
        "2026-03-01 10:00:00  == Select  superfiltering\n"
        "2026-03-01 10:00:31  warning: 3 rows are longer than max_length=2048 and were dropped: 17, 204, 388\n"
        "2026-03-01 10:03:31  warning: step 97: the gradient norm is not finite, the step was skipped\n"
        "2026-03-01 10:07:11  ✓ train  240 steps in 3 min 40 s\n"
    )
    return folder


def _metrics(rng: random.Random, steps: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        progress = step / steps
        loss = 0.62 + 1.3 * math.exp(-5 * progress) + rng.gauss(0, 0.09)
        warm = min(1.0, step / (0.03 * steps))
        line: dict[str, Any] = {
            "step": step,
            "tokens": step * 1480,
            "loss": loss,
            "lr": 2e-4 * warm * 0.5 * (1 + math.cos(math.pi * progress)),
            "grad_norm": 0.4 + math.exp(-4 * progress) + abs(rng.gauss(0, 0.12)),
            "tokens_per_s": 141 + rng.gauss(0, 4),
            "memory_bytes": int(2.1e9 + 2.5e8 * min(1, step / 30)),
        }
        if step == 97:
            line |= {"grad_norm": float("nan"), "loss": float("nan")}
        if step == 40:
            line["grad_norm"] = 38.0
        lines.append(line)
        if step % 40 == 0:
            lines.append({"step": step, "eval_loss": 0.66 + 1.2 * math.exp(-4.4 * progress)})
    return lines


def _evaluation(folder: Path, rng: random.Random) -> None:
    def metric(value: float, stderr: float | None, n: int) -> dict[str, Any]:
        return {"value": value, "stderr": stderr, "n": n}

    before = {
        "heldout": {"loss": metric(1.9342, 0.0412, 50), "perplexity": metric(6.918, 0.285, 50)},
        "generation": {"exact_match": metric(0.0781, 0.0338, 64), "mean_length": metric(96.2, 8.1, 64)},
        "multiple_choice": {"accuracy": metric(0.312, 0.0146, 1000)},
    }
    after = {
        "heldout": {"loss": metric(0.6711, 0.0287, 50), "perplexity": metric(1.956, 0.056, 50)},
        "generation": {"exact_match": metric(0.4219, 0.0622, 64), "mean_length": metric(71.4, 3.3, 64)},
        "multiple_choice": {"accuracy": metric(0.2810, 0.0142, 1000)},
    }
    _json(folder / "before.json", before)
    _json(folder / "results.json", after)
    old, new = [], []
    for index in range(64):
        row = {"question": "", "answer": ""}
        while not row.get("question"):
            row = problem(rng, 0)
        gold = row["answer"].split("#### ")[1]
        right, was = rng.random() < 0.42, rng.random() < 0.08
        base = {"id": index, "prompt": row["question"], "gold": gold}
        old.append(
            base
            | {
                "output": gold
                if was
                else "To solve this problem, we need to follow the steps given in the problem and add up the numbers. First, we "
                * 3,
                "score": float(was),
            }
        )
        new.append(
            base
            | {
                "output": row["answer"] if right else row["answer"].replace(f"#### {gold}", f"#### {int(gold) + 3}"),
                "score": float(right),
            }
        )
    _lines(folder / "predictions/before/generation.jsonl", old)
    _lines(folder / "predictions/generation.jsonl", new)
    losses = [(rng.gauss(1.93, 0.3), rng.gauss(0.67, 0.2)) for _ in range(50)]
    for name, which in (("predictions/before/heldout.jsonl", 0), ("predictions/heldout.jsonl", 1)):
        _lines(
            folder / name,
            [{"id": i, "tokens": 90, "loss": pair[which], "correct": 61} for i, pair in enumerate(losses)],
        )


def _selection(folder: Path, rng: random.Random, np_rng: np.random.Generator, rows: int) -> None:
    pool = [problem(rng, index) for index in range(rows)]
    length = np.array([len(" ".join(map(str, row.values()))) / 3.6 for row in pool]).round()
    score = np.clip(np_rng.normal(0.72, 0.16, rows) + (length < 25) * 0.2, 0.05, 1.6)
    score[[5, 77]] = np.nan
    ranked = np.argsort(-np.where(np.isnan(score) | (score >= 1), -1, score), kind="stable")[: rows // 4]
    selected = np.zeros(rows, bool)
    selected[ranked] = True
    rank = pa.array([int(np.flatnonzero(ranked == i)[0]) + 1 if selected[i] else None for i in range(rows)], pa.int64())
    conditional = np_rng.gamma(6, 0.25, rows)
    columns = {
        "id": np.arange(rows),
        "ifd": score,
        "conditional": conditional,
        "direct": conditional / score,
        "selected": selected,
        "rank": rank,
    }
    parquet.write_table(pa.table(columns), folder / "scores.parquet")
    parquet.write_table(pa.table({"id": np.arange(rows), "tokens": length.astype(int)}), folder / "lengths.parquet")
    _lines(folder / "selected.jsonl", [{"id": int(i), **pool[i]} for i in ranked])
    _lines(folder / "examples.jsonl", [{"id": int(i), **pool[i]} for i in range(rows) if not selected[i] and i % 5])
    _json(
        folder / "summary.json",
        {
            "select": "superfiltering",
            "column": "ifd",
            "picker": "top_k",
            "budget": 0.25,
            "pool": rows,
            "unscored": {"rows": 2, "reasons": {}},
            "filtered": int((score >= 1).sum()),
            "picked": int(selected.sum()),
            "tokens": int(length[selected].sum()),
        },
    )
    _tokens(folder, [(int(i), pool[i]) for i in ranked[:40]], np_rng)


def _tokens(folder: Path, rows: list[tuple[int, dict[str, Any]]], np_rng: np.random.Generator) -> None:
    table: dict[str, list[Any]] = {"id": [], "position": [], "token": [], "score": [], "weight": []}
    for identity, row in rows:
        asked, answered = (
            str(row.get(key[0]) or row.get(key[1])) for key in (("question", "instruction"), ("answer", "output"))
        )
        tokens = ["<|im_start|>", "user", "\n", *_pieces(asked), "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
        prompt = len(tokens)
        tokens += [*_pieces(answered), "<|im_end|>"]
        for position, token in enumerate(tokens):
            score = float(np_rng.gamma(1.4, 0.9)) if position >= prompt else math.nan
            weight = 0.0 if position < prompt or score < 0.4 else min(1.0, round(score / 2, 3))
            for name, value in zip(table, (identity, position, token, score, weight), strict=True):
                table[name].append(value)
    parquet.write_table(pa.table(table), folder / "tokens.parquet")


def _pieces(text: str) -> list[str]:
    """Words with their leading space, line ends alone."""
    pieces: list[str] = []
    for index, line in enumerate(text.split("\n")):
        if index:
            pieces.append("\n")
        pieces += [word if at == 0 else f" {word}" for at, word in enumerate(line.split())]
    return pieces


def _summary(steps: int) -> dict[str, Any]:
    return {
        "recipe": "qlora_sft",
        "status": "done",
        "steps": steps,
        "tokens": steps * 1480,
        "wall_s": 431.8,
        "peak_memory_bytes": 2_412_000_000,
        "trainable_parameters": 460_800,
        "total_parameters": 134_515_008,
        "final_loss": 0.6384,
        "metrics": {},
        "selected_rows": 150,
    }


def _lock() -> dict[str, Any]:
    return {
        "command": ["train", "recipe=qlora_sft", "select=superfiltering", "budget=0.25", "tokens=token_cleaning"],
        "seed": 0,
        "versions": {
            "python": "3.11.7",
            "ftrun": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
        },
        "git": {"commit": "3f1c9a7", "changed": False},
        "hardware": {"platform": "Linux-6.1-x86_64", "processor": "a processor", "cores": 2},
        "fingerprints": {"data": "91c0d7aa02b1e4f5", "model": "5e1f00c2a9d37b46", "template": "c41d8cd98f00b204"},
    }


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    from ftrun.reporting.html import write_report

    print(write_report(make(Path(sys.argv[1]))))
