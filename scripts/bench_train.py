"""Training speed and memory against TRL's SFTTrainer, in one run: `python scripts/bench_train.py --json speed.json`.

Every contender trains the same rows in the same order from the same LoRA weights, in a process of its own, so that its
peak memory is its own. TRL is no dependency of ftrun: install it beside, and start with

    pip install --target .trl --no-deps trl==1.16.0
    PYTHONPATH=.trl python scripts/bench_train.py

The limit of arithmetic is 4 x parameters x tokens (forward, and the gradient of what flows through frozen weights) at
the speed of a large float32 matrix product on the same threads, measured between the contenders. Everything is float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

INSTALL = "pip install --target .trl --no-deps trl==1.16.0, then PYTHONPATH=.trl"
BATCH, RATE, RANK, ALPHA, SEED = 8, 1e-3, 8, 16, 0
CONTENDERS = {
    "trl_8": "TRL, batch 8 as it comes",
    "trl_8_chunked": "TRL, batch 8, chunked_nll",
    "trl_1x8": "TRL, batch 1, accumulation 8",
    "ftrun": "ftrun",
}
AGAINST = ("trl_8", "trl_8_chunked", "trl_1x8")


# ---- rows ----


def write_rows(file: Path, rows: int, longest: int) -> None:
    """Alpaca rows with short prompts and 2 to ``longest`` response tokens, log-uniform, cut from worked solutions."""
    import numpy as np

    from ftrun.config.settings import ModelConfig
    from ftrun.data.builtin import builtin_rows
    from ftrun.models.load import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig())
    source = list(builtin_rows("builtin:gsm_symbolic:400"))
    stream = tokenizer(" ".join(row["output"] for row in source), add_special_tokens=False).input_ids
    generator = np.random.default_rng(SEED)
    lengths = np.exp(generator.uniform(math.log(2), math.log(longest), rows)).round().astype(int)
    lengths[0] = longest  # the longest row decides the memory: it is always there
    at, lines = 0, []
    for row, length in zip(source, lengths.tolist(), strict=False):
        question = row["instruction"].split(". ")[-1]
        lines.append({"instruction": question, "output": tokenizer.decode(stream[at : at + length]).strip() or "0"})
        at = (at + length) % (len(stream) - longest)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def settings_words(rows: Path, batch_tokens: int | None) -> list[str]:
    words = [
        f"data.path={rows}",
        "data.heldout=0",
        f"model.dtype={machine.DTYPE}",
        "recipe=lora_sft",
        f"adapter.r={RANK}",
        f"adapter.lora_alpha={ALPHA}",
        "adapter.lora_dropout=0",
        "adapter.target_modules=[q_proj,v_proj]",
        "schedule=constant",
        "optim=adamw",
        f"optim.learning_rate={RATE}",
        "optim.weight_decay=0",
        f"train.batch_size={BATCH}",
        "train.max_grad_norm=1.0",
        f"seed={SEED}",
    ]
    return words + ([f"train.batch_tokens={batch_tokens}"] if batch_tokens else [])


# ---- contenders, each in its own process ----


def train_with_ftrun(rows: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import ftrun

    out = folder / "run"
    more = ["eval=[]", "stages=[train]", f"out={out}", f"launch.threads={options.threads}"]
    ftrun.run("train", overrides=[*settings_words(rows, options.batch_tokens), *more])
    lines = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    seconds, before = 0.0, 0
    for line in lines:
        seconds += (line["tokens"] - before) / line["tokens_per_s"]
        before = line["tokens"]
    return {"losses": [line["loss"] for line in lines], "seconds": seconds, "tokens": before}


def train_with_trl(rows: Path, folder: Path, options: argparse.Namespace, **choices: Any) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    from ftrun.config.compose import load
    from ftrun.data.batches import Plan
    from ftrun.data.pool import load_pool
    from ftrun.data.prepare import prepare
    from ftrun.models.demo import smollm2_135m
    from ftrun.models.load import load_config, load_tokenizer

    settings = load(settings_words(rows, None)).settings
    tokenizer, config = load_tokenizer(settings.model), load_config(settings.model)
    pool = load_pool(settings.data, folder / "data", SEED)
    shape = {"context_length": config.max_position_embeddings, "vocab_size": config.vocab_size}
    table = prepare(pool, tokenizer, settings.data, **shape, folder=folder / "tokens").table
    plan = Plan.of(len(table), BATCH, 1.0, None, SEED)
    order = [table.sequence(int(row)) for step in range(plan.steps) for row in plan.step(step)]
    dataset = Dataset.from_list(
        [
            {"input_ids": s.input_ids.tolist(), "completion_mask": (s.loss_weight > 0).astype(int).tolist()}
            for s in order
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(smollm2_135m(), dtype=torch.float32)
    torch.manual_seed(SEED)
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    losses: list[float] = []
    clock = {"seconds": 0.0, "started": 0.0, "loss": 0.0}

    class Ordered(SFTTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            clock["loss"] += float(loss)
            return loss

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock["started"], clock["loss"] = time.perf_counter(), 0.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock["seconds"] += time.perf_counter() - clock["started"]
            losses.append(clock["loss"])

    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        completion_only_loss=True,
        max_length=None,
        shuffle_dataset=False,
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        optim="adamw_torch",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        fp16=False,
        disable_tqdm=True,
        seed=SEED,
        **choices,
    )
    trainer = Ordered(
        model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[Clock()]
    )
    trainer.train()
    tokens = sum(len(sequence.input_ids) for sequence in order)
    return {"losses": losses, "seconds": clock["seconds"], "tokens": tokens}


WORKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "ftrun": train_with_ftrun,
    "trl_8": lambda *a: train_with_trl(*a, per_device_train_batch_size=BATCH),
    "trl_8_chunked": lambda *a: train_with_trl(*a, per_device_train_batch_size=BATCH, loss_type="chunked_nll"),
    "trl_1x8": lambda *a: train_with_trl(*a, per_device_train_batch_size=1, gradient_accumulation_steps=BATCH),
}


def matmul_speed(seconds: float = 2.0, size: int = 2048) -> float:
    """Best speed of a large float32 matrix product, operations per second."""
    import torch

    left, right = torch.randn(size, size), torch.randn(size, size)
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def work(name: str, rows: Path, folder: Path, options: argparse.Namespace) -> None:
    """One contender in this process; its result goes to FOLDER/result.json."""
    import torch

    torch.set_num_threads(options.threads)
    result: dict[str, Any]
    torch.set_default_dtype(getattr(torch, machine.DTYPE))
    if name == "matmul":
        result = {"operations_per_s": matmul_speed()}
    else:
        result = WORKERS[name](rows, folder, options)
        result["threads"] = torch.get_num_threads()
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / "result.json").write_text(json.dumps(result))


# ---- the run ----


def start(name: str, rows: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    folder.mkdir(parents=True)
    words = [sys.executable, __file__, "--worker", name, "--folder", str(folder), "--rows-file", str(rows)]
    words += ["--threads", str(options.threads)]
    words += ["--batch-tokens", str(options.batch_tokens)] if options.batch_tokens else []
    environment = machine.pinned(options.threads) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "log").open("w") as log:
        ended = subprocess.run(words, env=environment, stdout=log, stderr=log, check=False).returncode
    if ended:
        raise SystemExit(f"{name} failed:\n" + "\n".join((folder / "log").read_text().splitlines()[-15:]))
    result = json.loads((folder / "result.json").read_text())
    if result.get("threads", options.threads) != options.threads:
        raise SystemExit(f"{name} took {result['threads']} threads, not {options.threads}")
    return result


def compare(results: dict[str, dict[str, Any]], speed: float, parameters: int) -> list[dict[str, Any]]:
    """One line a contender: its numbers, and its ratios to every TRL contender that ran."""
    limit = speed / (4 * parameters)
    lines = []
    for name, result in results.items():
        rate = result["tokens"] / result["seconds"]
        line = {
            "name": name,
            "dtype": machine.DTYPE,
            "threads": result["threads"],
            "tokens": result["tokens"],
            "tokens_per_s": rate,
            "peak_bytes": result["peak_bytes"],
        }
        line["share_of_limit"] = rate / limit
        for other in AGAINST:
            if other in results and other != name:
                theirs = results[other]
                line[f"speed_vs_{other}"] = rate * theirs["seconds"] / theirs["tokens"]
                line[f"memory_vs_{other}"] = result["peak_bytes"] / theirs["peak_bytes"]
                pairs = zip(result["losses"], theirs["losses"], strict=True)
                line[f"loss_difference_vs_{other}"] = max(abs(a - b) for a, b in pairs)
        lines.append(line)
    return lines


def show(lines: list[dict[str, Any]], speed: float, parameters: int, ground: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    versus = [other for other in AGAINST if any(line["name"] == other for line in lines)]
    limit = f"limit of arithmetic: {speed / 4 / parameters:.0f} tokens/s at {speed / 1e9:.0f} GFLOP/s"
    table = Table(title=f"{machine.header(ground)}\n{limit}")
    for title in (
        "",
        "dtype",
        "threads",
        "tokens",
        "tokens/s",
        "of limit",
        "peak GB",
        *(f"{kind} vs {o}" for o in versus for kind in ("speed", "memory", "loss")),
    ):
        table.add_column(title, justify="right" if title else "left")
    for line in lines:
        cells = [
            CONTENDERS[line["name"]],
            line["dtype"],
            str(line["threads"]),
            str(line["tokens"]),
            f"{line['tokens_per_s']:.1f}",
            f"{line['share_of_limit']:.0%}",
            f"{line['peak_bytes'] / 1e9:.2f}",
        ]
        for other in versus:
            if f"speed_vs_{other}" in line:
                cells += [
                    f"{line[f'speed_vs_{other}']:.2f}x",
                    f"{line[f'memory_vs_{other}']:.2f}x",
                    f"{line[f'loss_difference_vs_{other}']:.1e}",
                ]
            else:
                cells += ["", "", ""]
        table.add_row(*cells)
    Console(width=200).print(table)


def token_methods(options: argparse.Namespace) -> None:
    """Steps of 8 rows with every token method; ``--only`` names some of them."""
    import bench_tokens
    import torch

    torch.set_num_threads(options.threads)
    names = None if options.only == ",".join(CONTENDERS) else options.only.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        write_rows(rows, BATCH, 200 if options.quick else options.longest)
        bench_tokens.run(rows, "builtin:smollm2_135m", BATCH, options.rounds, names, options.json, options.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=48, help="rows, a multiple of 8")
    parser.add_argument("--longest", type=int, default=800, help="response tokens of the longest row")
    parser.add_argument("--quick", action="store_true", help="16 rows of at most 200 response tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, help="train.batch_tokens of ftrun; its default if not given")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, by comma: " + ", ".join(CONTENDERS))
    parser.add_argument("--tokens", action="store_true", help="overhead of token methods instead: see bench_tokens.py")
    parser.add_argument("--rounds", type=int, default=8, help="with --tokens: steps of every method")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    for hidden in ("--worker", "--folder", "--rows-file"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokens:
        return token_methods(options)
    if options.worker:
        return work(options.worker, Path(options.rows_file), Path(options.folder), options)
    chosen = options.only.split(",")
    if any(name.startswith("trl") for name in chosen) and importlib.util.find_spec("trl") is None:
        raise SystemExit(f"TRL is not installed: {INSTALL}\nOr measure ftrun alone: --only ftrun")
    ground = machine.facts(options.threads)
    print(machine.header(ground), file=sys.stderr, flush=True)
    rows, longest = (16, 200) if options.quick else (options.rows, options.longest)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(folder / "rows.jsonl", rows, longest)
        speeds, results = [], {}
        for name in chosen:
            speeds.append(
                start("matmul", folder / "rows.jsonl", folder / f"matmul_{name}", options)["operations_per_s"]
            )
            results[name] = start(name, folder / "rows.jsonl", folder / name, options)
            print(f"{CONTENDERS[name]}: {results[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
    parameters = 134_515_008  # SmolLM2-135M, the tied head once
    lines = compare(results, max(speeds), parameters)
    show(lines, max(speeds), parameters, ground)
    if options.json:
        facts = {"machine": ground, "rows": rows, "longest": longest, "matmul_operations_per_s": speeds}
        options.json.write_text(json.dumps(facts | {"contenders": lines, "runs": results}, indent=1))
    return None


if __name__ == "__main__":
    main()
