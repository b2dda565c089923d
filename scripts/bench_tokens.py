"""Time of an optimiser step with every token method against plain SFT, in one process: `python scripts/bench_train.py --tokens`.

All methods train the same rows from the same LoRA weights, each on its own copy of the model. In every round each method makes a step,
one after the other, plain SFT first; the ratio is the median over the rounds of its time to that of SFT in the round.
What a method computes once before training (losses under a reference) is not in it.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np

BASELINE = "sft"
# method -> the words that choose it; references are the model itself: what they cost does not depend on what they say
METHODS = {
    BASELINE: [],
    "dft": ["tokens=dft"],
    "talr": ["tokens=talr"],
    "entropy_weighting": ["tokens=entropy_weighting"],
    "rho1": ["tokens=rho1", "tokens.reference={model}"],
    "pear": ["tokens=pear", "tokens.behaviour={model}"],
    "forgetting_sft": ["tokens=forgetting_sft", "tokens.reference={model}"],
    "sstoken": ["tokens=sstoken", "tokens.warmup_samples=0"],
    "q_tuning": ["tokens=q_tuning"],
    "neftune": ["tokens=neftune"],
    "mft": ["tokens=mft"],
    "mutor": ["tokens=mutor", "train.packing=false"],
    "otr": ["objective=otr"],
    "otr_exact": ["objective=otr", "objective.rollouts=exact"],
    "caft_mtp": ["objective=caft_mtp"],
    "plain_unpacked": ["train.packing=false"],
}


@dataclass
class Contender:
    name: str
    trainer: Any
    seconds: list[float]


def contenders(rows: Path, model: str, batch: int, names: list[str], folder: Path, threads: int) -> list[Contender]:
    """A trainer a method."""
    from ftrun.config.compose import load
    from ftrun.data.pool import load_pool
    from ftrun.stages.chain import Chain
    from ftrun.stages.trained import plain_context
    from ftrun.training.signals import StopSignals

    made: list[Contender] = []
    for name in names:
        own = [word.format(model=model) for word in METHODS[name]]
        common = [f"data.path={rows}", f"model.path={model}", "data.heldout=0", f"train.batch_size={batch}"]
        common += [f"model.dtype={machine.DTYPE}", f"launch.threads={threads}"]
        loras = ["adapter=lora", "adapter.r=8", "schedule=constant", "optim.learning_rate=0", "optim.weight_decay=0"]
        composed = load([*common, *loras, "train.max_steps=1000", *own])
        ctx = plain_context(composed.settings, folder / name)
        ctx.out.mkdir(parents=True)
        chain = Chain(ctx, composed, [], StopSignals())
        chain.load_model()
        assert ctx.bundle is not None
        pool = chain.rows.edit(
            load_pool(composed.settings.data, chain.rows.work, composed.settings.seed), chain.load_model
        )
        table = chain.rows.weigh(chain.rows.prepare(pool, "rows").table, pool)
        ctx.train_tokens = table
        trainer: Any = chain.attach(table)
        trainer._bar = _Silent()
        made.append(Contender(name, trainer, []))
    return made


class _Silent:
    def advance(self, *_: Any, **__: Any) -> None:
        return


def measure(found: list[Contender], rounds: int) -> None:
    """One step of every method a round; the first round warms up and does not count."""
    for number in range(rounds + 1):
        for one in found:
            one.trainer.progress.step = number
            started = time.perf_counter()
            one.trainer._step(number)
            if number:
                one.seconds.append(time.perf_counter() - started)


def table(found: list[Contender]) -> list[dict[str, Any]]:
    base = np.array(next(one.seconds for one in found if one.name == BASELINE))
    lines = []
    for one in found:
        ratios = np.array(one.seconds) / base
        lines.append(
            {
                "method": one.name,
                "seconds": float(np.median(one.seconds)),
                "ratio": float(np.median(ratios)),
                "lowest": float(ratios.min()),
                "highest": float(ratios.max()),
            }
        )
    return lines


def run(
    rows: Path, model: str, batch: int, rounds: int, names: list[str] | None, json_file: Path | None, threads: int
) -> None:
    """Measure and print the table, lowest overhead first."""
    ground = machine.facts(threads)
    print(machine.header(ground), flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        found = contenders(
            rows, model, batch, [BASELINE, *(n for n in names or METHODS if n != BASELINE)], Path(folder), threads
        )
        measure(found, rounds)
        lines = sorted(table(found), key=lambda line: line["ratio"])
    print(f"one step of {batch} rows, {rounds} rounds; ratio to plain SFT in the same round")
    print(f"{'method':<20}{'seconds':>10}{'ratio':>8}   lowest to highest    dtype, threads")
    for line in lines:
        print(
            f"{line['method']:<20}{line['seconds']:>10.3f}{line['ratio']:>8.3f}   {line['lowest']:.3f} to {line['highest']:.3f}"
            f"       {ground['dtype']}, {ground['threads']}"
        )
    if json_file:
        json_file.write_text(json.dumps({"machine": ground, "methods": lines}, indent=1) + "\n")
