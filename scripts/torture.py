"""A seeded campaign of accidents: every fault is followed by a resume, and the run compared with the undisturbed one.

    nice -n 19 python scripts/torture.py --work /tmp/torture --table docs/torture.md
    nice -n 19 python scripts/torture.py --work /tmp/torture --only 17

The first line carries the campaign on for ``--seconds`` and may be repeated until it is finished; the second repeats one
fault. Outcomes: ``survived``, the run ended with the same bits as the undisturbed one (trained weights, losses, selected
rows, evaluations); ``refused``, one clear line with the right exit code that names the file; everything else is ``lost``.
Processes are forked from one that has made the imports, as the tests start theirs, so a fault costs seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
sys.path[:0] = [str(SCRIPTS), str(ROOT / "tests"), str(ROOT)]

import faults  # noqa: E402
import warm_processes  # noqa: E402

PROGRAM = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import faults; faults.arm()"
LIMIT = 90.0  # seconds that a tiny run may take before it counts as hung
STEPS = 6
COMMON = [
    *("data.max_length=256", "data.heldout=0.2", f"train.max_steps={STEPS}", "train.save_steps=1"),
    *("train.batch_size=4", "train.eval_steps=2", "eval=[heldout]", "optim.learning_rate=1e-3", "launch.threads=1"),
]
SUBJECTS = {
    "scored": ["recipe=ppl_response", "budget=0.7", "adapter.r=4", "adapter.lora_dropout=0.1", "train.load_best=true"],
    "sft": ["recipe=sft"],
    "lisa": ["recipe=lisa", "adapter.layers=1", "adapter.interval=2"],
    "scored x2": ["recipe=ppl_response", "budget=0.7", "adapter.r=4", "launch.processes=2"],
    "lisa x2": ["recipe=lisa", "adapter.layers=1", "adapter.interval=2", "launch.processes=2"],
}
ALONE, TEAMS = ("scored", "sft", "lisa"), ("scored x2", "lisa x2")
IN_A_STEP = ("begin a step", "clip", "update")
IN_TEAM = (*IN_A_STEP, "score a batch", "held-out loss", "evaluate")  # where processes wait for each other


@dataclass
class Ended:
    """How a process ended; ``code`` is minus a signal's number where one ended it, None where it hung."""

    code: int | None
    said: str

    @property
    def refusal(self) -> str | None:
        """The clear line that it ended with; None where it is none."""
        at = self.said.rfind("ftrun: ")
        text = self.said[at:] if at >= 0 else ""
        clear = self.code in (2, 3, 4, 5, 130, 143) and "Traceback" not in self.said
        return text.strip() if clear and text and "a component failed" not in text else None


@dataclass
class Fault:
    """One accident of the campaign. ``draw`` is its own source of chance: it can be repeated alone."""

    number: int
    kind: str
    subject: str
    draw: random.Random
    told: dict[str, Any] = field(default_factory=dict)  # what was drawn


@dataclass
class Outcome:
    number: int
    kind: str
    subject: str
    outcome: str  # survived, refused, lost
    told: dict[str, Any]
    why: str
    seconds: float


class Refused(Exception):
    """The way the fault ended is a clear refusal, and meant to be."""


class Lost(Exception):
    """Neither the same bits nor a clear refusal."""


class Skipped(Exception):
    """This machine cannot have this kind of accident."""


# ---- the arena: model, rows, and commands ----


class Arena:
    """Folders of a campaign, and how its commands are run."""

    def __init__(self, work: Path, name: str = "first"):
        self.work = work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.notes, self.said = self.work / f"notes {name}", self.work / f"said {name}"
        self.model, self.rows = self.work / "model", self.work / "rows.jsonl"
        if os.path.ismount(self.work / "disk"):  # of a campaign that was stopped
            subprocess.run(["umount", "-l", str(self.work / "disk")], check=True)
        if not self.rows.exists():
            _make_inputs(self.model, self.rows)

    def words(self, subject: str, target: str, verb: str = "train") -> list[str]:
        data = [f"model.path={self.model}", f"data.path={self.rows}"]
        return [verb, *SUBJECTS[subject], *data, *COMMON, target]

    def start(self, words: list[str], cache: Path, fault: dict[str, Any] | None = None) -> warm_processes.Popen:
        shutil.rmtree(self.notes, ignore_errors=True)
        self.notes.mkdir()
        processes = 2 if "launch.processes=2" in words else 1
        said = {"notes": str(self.notes), "processes": processes, **(fault or {})}
        environment = os.environ | {
            "FTRUN_CACHE": str(cache),
            "WARM_BEFORE": PROGRAM,
            faults.VARIABLE: json.dumps(said),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "ftrun", *words]
        with self.said.open("wb") as stream:
            return warm_processes.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=stream.fileno(), start_new_session=True
            )

    def finish(self, process: warm_processes.Popen, limit: float = LIMIT) -> Ended:
        """Wait for a command and all that it started; what hangs is killed, and has no code."""
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        deadline = time.monotonic() + (30 if code is not None else 0)
        while (alive := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait(10)
        said = self.said.read_text(errors="replace")
        if alive and code is not None:
            said += f"\nprocesses {alive} outlived the command"
            code = None
        return Ended(code, said)

    def alive(self, states: str = "RSDTtIW") -> list[int]:
        """Processes of the last command that still run; T: those that stand still."""
        found = []
        for note in self.notes.glob("*.pid"):
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{note.stem}/stat").read_text().rpartition(")")[2].split()[0]
                if state in states:
                    found.append(int(note.stem))
        return found

    def run(self, words: list[str], cache: Path, fault: dict[str, Any] | None = None) -> Ended:
        return self.finish(self.start(words, cache, fault))

    # ---- what the campaign compares with ----

    def undisturbed(self, subject: str) -> dict[str, Any]:
        """What the subject computes when nothing happens, how often it passes each point, and how long it takes."""
        file = self.work / f"undisturbed {subject}.json"
        if not file.exists():
            out, cache = self.work / f"undisturbed {subject}", self.work / f"cache {subject}"
            for folder in (out, cache):
                shutil.rmtree(folder, ignore_errors=True)
            warm_processes.run([sys.executable, "-c", "pass"])  # the server that forks has made its imports
            started = time.monotonic()
            ended = self.run(self.words(subject, f"out={out}"), cache, {"do": "count"})
            if ended.code != 0:
                sys.exit(f"the undisturbed run of {subject} failed:\n{ended.said}")
            seconds = time.monotonic() - started
            counts = {f.stem.partition("-")[2]: json.loads(f.read_text()) for f in self.notes.glob("counts-*.json")}
            file.write_text(json.dumps({"bits": bits(out), "counts": counts, "seconds": seconds}))
        return json.loads(file.read_text())

    def stopped_midway(self, subject: str) -> tuple[Path, Path]:
        """Run folder and cache of the subject, killed in the fifth step with two checkpoints: copied, not made again."""
        out, cache = self.work / f"midway {subject}", self.work / f"midway cache {subject}"
        if not (out / "midway").exists():
            for folder in (out, cache):
                shutil.rmtree(folder, ignore_errors=True)
            fault = {"do": "kill", "point": "clip", "nth": 5}
            self.run(self.words(subject, f"out={out}"), cache, fault)
            (out / "midway").touch()
        return out, cache


def _make_inputs(model: Path, rows: Path) -> None:
    """In a process of its own: this one must not compute before it forks."""
    code = f"import torture; from pathlib import Path; torture.make_inputs(Path({str(model)!r}), Path({str(rows)!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(ROOT)])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def make_inputs(model: Path, rows: Path) -> None:
    import torch
    from conftest import make_tokenizer
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    make_tokenizer(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends, tie_word_embeddings=True)).save_pretrained(model)
    made = [
        {
            "instruction": f"what is {i} plus {i % 5}",
            "input": "",
            "output": "answers: " + "yes no " * (1 + i % 6) + str(i),
        }
        for i in range(36)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))


def bits(out: Path) -> dict[str, Any]:
    """All that a run computed, as it must come out again."""
    import numpy as np
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    found: dict[str, Any] = {"summary": _only(json.loads((out / "summary.json").read_text()))}
    newest = sorted((out / "train/checkpoints").glob("step-*"))[-1]
    for file in [
        newest / "trainable.safetensors",
        *sorted(out.glob("adapter/*.safetensors")),
        *out.glob("model/*.safetensors"),
    ]:
        for name, value in load_file(file).items():
            key = f"{file.relative_to(out)} {name}"
            found[key] = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
    lines = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = [
        {key: value for key, value in line.items() if key not in ("tokens_per_s", "memory_bytes")} for line in lines
    ]
    for name in ("eval/before.json", "eval/results.json"):
        found[name] = json.loads((out / name).read_text())
    if (out / "selection/selected.jsonl").exists():
        found["selected.jsonl"] = (out / "selection/selected.jsonl").read_text()
        scores = pq.read_table(out / "selection/scores.parquet")
        found["scores.parquet"] = hashlib.sha256(str(scores.to_pydict()).encode()).hexdigest()
    return found


def _only(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        key: summary[key]
        for key in ("status", "steps", "tokens", "final_loss", "trainable_parameters", "selected_rows")
    }


# ---- judging ----


class Judge:
    """One fault at work: a folder and a cache of its own, and the questions that decide."""

    def __init__(self, arena: Arena, fault: Fault):
        self.arena, self.fault, self.draw, self.told = arena, fault, fault.draw, fault.told
        self.subject = fault.subject
        self.whole = arena.undisturbed(fault.subject)
        self.out, self.cache = arena.work / "run", arena.work / "cache"
        for folder in (self.out, self.cache):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def first(self) -> list[str]:
        return self.arena.words(self.subject, f"out={self.out}")

    @property
    def again(self) -> list[str]:
        return self.arena.words(self.subject, f"resume={self.out}")

    def instant(self, points: tuple[str, ...] | None = None, rank: int = 0) -> dict[str, Any]:
        """One of the moments that the undisturbed run passes: a point, and for the how manieth time."""
        counts = self.whole["counts"][str(rank)]
        point = self.draw.choice([point for point in sorted(counts) if points is None or point in points])
        chosen = {"point": point, "nth": self.draw.randint(1, counts[point]), "rank": rank}
        chosen["after"] = self.draw.random() < 0.5
        self.told |= chosen
        return chosen

    def ends_clearly(self, ended: Ended, codes: tuple[int, ...], *names: str) -> None:
        """A process that was not killed says why it ends, with one of these codes, naming what it is about."""
        if ended.code not in codes or ended.refusal is None:
            raise Lost(f"ended with {ended.code}, not {codes}: {ended.said[-600:]}")
        if names and not any(name in ended.refusal for name in names):
            raise Lost(f"does not name {' or '.join(names)}: {ended.refusal}")

    def comes_out_the_same(self, refusal: tuple[str, ...] = ()) -> None:
        """Resume; the bits are those of the undisturbed run. Refused where ``refusal`` says what may be named."""
        ended = self.arena.run(self.again, self.cache)
        if ended.code == 2 and ended.refusal and "there is no run in" in ended.refusal:
            ended = self.arena.run(self.first, self.cache)  # nothing was begun
        if ended.code != 0:
            if refusal and ended.refusal and any(name in ended.refusal for name in refusal):
                raise Refused(ended.refusal)
            raise Lost(f"resume ended with {ended.code}: {ended.said[-600:]}")
        self.is_the_same()

    def is_the_same(self) -> None:
        found, wanted = json.loads(json.dumps(bits(self.out))), self.whole["bits"]
        odd = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        if odd:
            raise Lost(f"differs silently in {', '.join(odd[:6])}")


# ---- the kinds of faults ----

KINDS: dict[str, tuple[Callable[[Judge], None], int, tuple[str, ...]]] = {}


def kind(
    name: str, tries: int, subjects: tuple[str, ...]
) -> Callable[[Callable[[Judge], None]], Callable[[Judge], None]]:
    def note(function: Callable[[Judge], None]) -> Callable[[Judge], None]:
        KINDS[name] = (function, tries, subjects)
        return function

    return note


@kind("SIGKILL at a random instant", 40, ALONE)
def killed_at_random(judge: Judge) -> None:
    _hit_at_random(judge, signal.SIGKILL)
    judge.comes_out_the_same()


@kind("SIGKILL at a pause point", 60, ALONE)
def killed_at_a_point(judge: Judge) -> None:
    judge.arena.run(judge.first, judge.cache, {"do": "kill", **judge.instant()})
    judge.comes_out_the_same()


@kind("SIGKILL twice, while resuming too", 10, ALONE)
def killed_twice(judge: Judge) -> None:
    judge.arena.run(judge.first, judge.cache, {"do": "kill", **judge.instant(IN_A_STEP)})
    judge.arena.run(judge.again, judge.cache, {"do": "kill", **judge.instant()})
    judge.comes_out_the_same()


@kind("SIGTERM at a random instant", 24, (*ALONE, "lisa x2"))
def stopped_at_random(judge: Judge) -> None:
    ended = _hit_at_random(judge, signal.SIGTERM)
    if ended.code not in (0, -signal.SIGTERM):  # before it could catch it, the system's own answer
        judge.ends_clearly(ended, (143,))
    judge.comes_out_the_same()


@kind("SIGTERM at a pause point", 16, ALONE)
def stopped_at_a_point(judge: Judge) -> None:
    ended = judge.arena.run(judge.first, judge.cache, {"do": "term", **judge.instant()})
    if ended.code != 0:  # all was written already
        judge.ends_clearly(ended, (143,))
    judge.comes_out_the_same()


def _hit_at_random(judge: Judge, number: int) -> Ended:
    delay = judge.draw.uniform(0.02, judge.whole["seconds"])
    judge.told["seconds"] = round(delay, 3)
    process = judge.arena.start(judge.first, judge.cache)
    time.sleep(delay)
    process.send_signal(number)
    return judge.arena.finish(process)


def _midway(judge: Judge) -> Path:
    out, cache = judge.arena.stopped_midway(judge.subject)
    shutil.copytree(out, judge.out)
    shutil.copytree(cache, judge.cache)
    return judge.out / "train" / "checkpoints"


def _damage_checkpoint(judge: Judge, how: str) -> None:
    folder = _midway(judge)
    checkpoints = sorted(folder.glob("step-*"))
    file = judge.draw.choice(sorted(path.name for path in checkpoints[-1].iterdir()))
    which = judge.draw.choice(["newest", "newest", "all", "older"])
    where = judge.draw.random()
    judge.told |= {"file": file, "how": how, "where": round(where, 4), "checkpoints": which}
    chosen = {"newest": checkpoints[-1:], "all": checkpoints, "older": checkpoints[:-1]}[which]
    for checkpoint in chosen:
        faults.damage(checkpoint / file, how, where)
    judge.comes_out_the_same(() if which == "newest" else (str(folder),))


@kind("checkpoint: a bit flipped", 30, ALONE)
def flipped(judge: Judge) -> None:
    _damage_checkpoint(judge, "flip")


@kind("checkpoint: a file cut off or gone", 24, ALONE)
def cut_off(judge: Judge) -> None:
    _damage_checkpoint(judge, judge.draw.choice(["truncate", "truncate", "remove"]))


@kind("NaN or infinity in a gradient", 14, ALONE)
def not_a_number(judge: Judge) -> None:
    fault = judge.instant(("clip",)) | {"do": "nan", "variant": judge.draw.randrange(3), "after": False}
    judge.ends_clearly(judge.arena.run(judge.first, judge.cache, fault), (5,), f"at step {fault['nth']}")
    judge.comes_out_the_same()


@kind("out of memory", 24, ALONE)
def no_memory(judge: Judge) -> None:
    points = ("tokenise", "score a batch", "clip", "update", "save", "write tensors", "held-out loss", "evaluate")
    fault = judge.instant(points) | {"do": "memory", "variant": judge.draw.randrange(3)}
    judge.ends_clearly(judge.arena.run(judge.first, judge.cache, fault), (4,), "memory")
    judge.comes_out_the_same()


@kind("clock jump", 14, ALONE)
def clock(judge: Judge) -> None:
    fault = judge.instant((*IN_A_STEP, "score a batch")) | {"do": "clock"}
    fault["seconds"] = judge.draw.choice([-1, 1]) * judge.draw.choice([1, 3600, 86400 * 400])
    judge.told["seconds"] = fault["seconds"]
    ended = judge.arena.run(judge.first, judge.cache, fault)
    if ended.code != 0:
        raise Lost(f"ended with {ended.code}: {ended.said[-600:]}")
    judge.is_the_same()


@kind("cache: a file damaged", 36, ALONE)
def cache_damaged(judge: Judge) -> None:
    """The cache of a finished run, one of its files flipped, cut off or gone; the next run finds it."""
    shutil.copytree(judge.arena.work / f"cache {judge.subject}", judge.cache)
    file = judge.draw.choice(sorted(path for path in judge.cache.rglob("*") if path.is_file()))
    how, where = judge.draw.choice(["flip", "flip", "truncate", "remove"]), judge.draw.random()
    judge.told |= {"file": str(file.relative_to(judge.cache)), "how": how, "where": round(where, 4)}
    faults.damage(file, how, where)
    ended = judge.arena.run(judge.first, judge.cache)
    if ended.code != 0:
        judge.ends_clearly(ended, (2, 3), str(judge.cache))
        raise Refused(ended.refusal)
    judge.is_the_same()


@kind("cache: a scoring shard damaged", 10, ("scored",))
def shard_damaged(judge: Judge) -> None:
    instant = judge.instant(("write a shard",)) | {"do": "kill", "after": True}
    judge.arena.run(judge.first, judge.cache, instant)
    how, where = judge.draw.choice(["flip", "flip", "truncate"]), judge.draw.random()
    judge.told |= {"after": True, "how": how, "where": round(where, 4)}
    for file in judge.out.glob("selection/shards/*/*.npz"):
        faults.damage(file, how, where)
    judge.comes_out_the_same()


@kind("full disk (a small tmpfs)", 20, ALONE)
def full_disk(judge: Judge) -> None:
    """Too small for the run folder, or for the cache; enlarged before the resume."""
    what = judge.draw.choice(["run", "run", "cache"])
    usual = judge.arena.work / (f"undisturbed {judge.subject}" if what == "run" else f"cache {judge.subject}")
    pages = sum(-(-file.stat().st_size // 4096) for file in usual.rglob("*") if file.is_file())
    size = int(judge.draw.uniform(0.1, 0.95) * pages) * 4096
    judge.told |= {"of": what, "bytes": size}
    disk = judge.arena.work / "disk"
    with mounted(disk, f"size={size}"):
        if what == "run":
            judge.out = disk / "run"
        else:
            judge.cache = disk / "cache"
        ended = judge.arena.run(judge.first, judge.cache)
        if ended.code != 0:
            judge.ends_clearly(ended, (4,), "the disk is full")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        judge.comes_out_the_same() if ended.code else judge.is_the_same()


@kind("full disk at a write", 16, (*ALONE, "scored x2"))
def no_space(judge: Judge) -> None:
    points = ("write tensors", "write plain state", "write json", "keep in the cache", "write a shard", "write a line")
    ended = judge.arena.run(judge.first, judge.cache, {"do": "space", **judge.instant(points)})
    judge.ends_clearly(ended, (4,), "the disk is full")
    judge.comes_out_the_same()


@kind("read-only folder", 14, ALONE)
def read_only(judge: Judge) -> None:
    """A folder of the run can no longer be written in, from some step on; or nothing can, from the start."""
    if judge.draw.random() < 0.3:
        _midway(judge)
        disk = judge.arena.work / "disk"
        with mounted(disk, "size=64m"):
            shutil.copytree(judge.out, disk / "run")
            judge.out = disk / "run"
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            judge.told["folder"] = "all, while resuming"
            judge.ends_clearly(judge.arena.run(judge.again, judge.cache), (2,), str(disk))
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            judge.comes_out_the_same()
        return
    if subprocess.run(["chattr", "+i", str(judge.arena.rows)], capture_output=True).returncode:
        raise Skipped("no file may be made immutable here")
    subprocess.run(["chattr", "-i", str(judge.arena.rows)], check=True)
    folder = judge.draw.choice([".", "train", "train/checkpoints", "eval"])
    fault = {**judge.instant(IN_A_STEP), "do": "read-only", "folder": str(judge.out / folder)}
    fault["nth"] = max(2, fault["nth"])  # there is a checkpoint by then
    judge.told |= {"folder": folder, "nth": fault["nth"]}
    try:
        ended = judge.arena.run(judge.first, judge.cache, fault)
    finally:
        subprocess.run(["chattr", "-R", "-i", str(judge.out)], check=True)
    if ended.code != 0:
        judge.ends_clearly(ended, (2,), str(judge.out))
    judge.comes_out_the_same()


@kind("two runs in one folder", 10, (*ALONE, "lisa x2"))
def two_runs(judge: Judge) -> None:
    """The first one stands still while a second one is started with the same folder."""
    other = Arena(judge.arena.work, "second")
    process = judge.arena.start(judge.first, judge.cache, {"do": "stop", **judge.instant(IN_A_STEP)})
    deadline = time.monotonic() + LIMIT
    while not (stopped := judge.arena.alive("T")) and time.monotonic() < deadline:
        time.sleep(0.02)
    words = judge.draw.choice([judge.first, judge.again])
    judge.told["second"] = words[-1].partition("=")[0]
    second = other.run(words, judge.cache)
    for number in stopped:
        os.kill(number, signal.SIGCONT)
    ended = judge.arena.finish(process)
    judge.ends_clearly(second, (2,), str(judge.out))
    if ended.code != 0:
        raise Lost(f"the first run ended with {ended.code}: {ended.said[-600:]}")
    judge.is_the_same()


def _renamed(tensors: dict[str, Any]) -> None:
    name = min(tensors)
    tensors[f"{name}_of_old"] = tensors.pop(name)


def _narrowed(tensors: dict[str, Any]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].astype("float16")


def _reshaped(tensors: dict[str, Any]) -> None:
    name = min(tensors)
    tensors[name] = tensors[name].reshape(-1)[:-1].copy()


def _one_less(plain: dict[str, Any]) -> None:
    plain.pop("trained_tokens")


VERSIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {  # what another version of ftrun would write otherwise
    "progress has one more key": ("progress.json", lambda plain: plain.update(samples=12)),
    "progress lacks a key": ("progress.json", _one_less),
    "progress is of another format": ("progress.json", lambda plain: plain.update(format=99)),
    "the optimiser's tree is told otherwise": (
        "optimizer.json",
        lambda plain: plain.update(tree=plain.pop("__dict__")),
    ),
    "the adapter's state is a list": ("adapter_state.json", lambda plain: [plain]),
    "parameters have other names": ("trainable.safetensors", _renamed),
    "parameters are half as wide": ("trainable.safetensors", _narrowed),
    "a parameter has another shape": ("trainable.safetensors", _reshaped),
    "the optimiser's state is half as wide": ("optimizer.safetensors", _narrowed),
    "the optimiser's state has other names": ("optimizer.safetensors", _renamed),
    "the settings have one more key": ("../../../identity.json", lambda plain: plain["train"].update(shuffle=True)),
    "the settings lack a key": ("../../../identity.json", lambda plain: plain["data"].pop("unfit")),
    "the config has one more key": ("../../../config.yaml", lambda text: text + "shuffle: true\n"),
    "the lock names other versions": (
        "../../../lock.json",
        lambda plain: plain.update(versions={"ftrun": "0.0.1", "torch": "1.0"}),
    ),
}


@kind("another version wrote it", len(VERSIONS) * 2, ("scored", "lisa"))
def version_skew(judge: Judge) -> None:
    """The newest two checkpoints, or the run's record, as another version would have left them: whole, but different."""
    change = list(VERSIONS)[judge.fault.number // 2 % len(VERSIONS)]
    file, edit = VERSIONS[change]
    judge.told["change"] = change
    folder = _midway(judge)
    for checkpoint in sorted(folder.glob("step-*")):
        rewrite((checkpoint / file).resolve(), edit)
        if ".." in file:
            break
        seal(checkpoint)
    judge.comes_out_the_same((str(judge.out),))


def rewrite(file: Path, edit: Callable[[Any], Any]) -> None:
    """Change a file's content as another program would; ``edit`` changes it in place or returns the new one."""
    if file.suffix == ".safetensors":
        from safetensors.numpy import load_file, save_file

        tensors = load_file(file)
        if tensors:
            edit(tensors)
            save_file(tensors, file)
    elif file.suffix == ".json":
        plain = json.loads(file.read_text()) if file.exists() else {}
        changed = edit(plain)
        file.write_text(json.dumps(plain if changed is None or not isinstance(changed, list) else changed))
    else:
        file.write_text(edit(file.read_text()))


def seal(folder: Path) -> None:
    """A manifest that fits what lies there."""
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text())
    for name, entry in entries.items():
        content = (folder / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(entries))


@kind("the run's record cut off", 14, ALONE)
def record_cut(judge: Judge) -> None:
    """As a machine that loses power leaves files that were renamed before their content was on the disk."""
    _midway(judge)
    names = ("identity.json", "config.yaml", "eval/before.json", "selection/selected.jsonl")
    file = judge.draw.choice([name for name in names if (judge.out / name).exists()])
    where = judge.draw.choice([0.0, judge.draw.random()])
    judge.told |= {"file": file, "where": round(where, 4)}
    faults.damage(judge.out / file, "truncate", where)
    judge.comes_out_the_same((file,))


@kind("the base model changed before the resume", 6, ALONE)
def base_changed(judge: Judge) -> None:
    _midway(judge)
    weights = judge.arena.model / "model.safetensors"
    before = weights.read_bytes()
    try:
        where = judge.draw.uniform(0.5, 1.0)
        judge.told["where"] = round(where, 4)
        faults.damage(weights, "flip", where)
        judge.comes_out_the_same((str(judge.arena.model),))
    finally:
        weights.write_bytes(before)


@kind("a process of two dies", 14, TEAMS)
def one_dies(judge: Judge) -> None:
    rank = judge.draw.randrange(2)
    ended = judge.arena.run(judge.first, judge.cache, {"do": "kill", **judge.instant(IN_TEAM, rank)})
    judge.ends_clearly(ended, (4, 5), f"process {rank}")
    judge.comes_out_the_same()


@kind("the launcher of two is killed", 8, TEAMS)
def launcher_dies(judge: Judge) -> None:
    _hit_at_random(judge, signal.SIGKILL)
    judge.comes_out_the_same()


@kind("a process of two hangs", 8, TEAMS)
def one_hangs(judge: Judge) -> None:
    if importlib.util.find_spec("ftrun.training.agent") is None:
        raise Skipped("no agent watches the processes of this version")
    rank = judge.draw.randrange(2)
    words = [*judge.first[:-1], "launch.timeout=0.1", judge.first[-1]]
    ended = judge.arena.run(words, judge.cache, {"do": "stop", **judge.instant(IN_TEAM, rank)})
    judge.ends_clearly(ended, (5,), f"process {rank}", f"rank {rank}")
    judge.comes_out_the_same()


@kind("a process of two is out of memory", 6, TEAMS)
def one_out_of_memory(judge: Judge) -> None:
    rank = judge.draw.randrange(2)
    fault = judge.instant(("clip", "update"), rank) | {"do": "memory", "variant": judge.draw.randrange(3)}
    judge.ends_clearly(judge.arena.run(judge.first, judge.cache, fault), (4,), "memory")
    judge.comes_out_the_same()


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own. Raises Skipped where this process may mount none."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "torture", str(folder)], capture_output=True, text=True
    )
    if made.returncode:
        raise Skipped(f"no file system may be mounted here ({made.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# ---- the campaign ----


def plan(seed: int, short: int | None = None) -> list[Fault]:
    """All faults of a campaign, by number; a short one has this many, of every kind."""
    made: list[tuple[str, str]] = []
    for name, (_, tries, subjects) in KINDS.items():
        made += [(name, subjects[i % len(subjects)]) for i in range(tries)]
    numbered = list(enumerate(made, 1))
    if short:
        first: dict[str, list[Any]] = {}
        for number, entry in numbered:
            first.setdefault(entry[0], []).append((number, entry))
        turns = [
            row
            for place in range(len(numbered))
            for row in (rows[place] for rows in first.values() if place < len(rows))
        ]
        numbered = sorted(turns[:short])
    return [Fault(number, name, subject, random.Random(f"{seed}/{number}")) for number, (name, subject) in numbered]


def _all_kinds_alike(chosen: list[Fault]) -> list[Fault]:
    """Ordered so that a campaign which is cut short has tried about the same share of every kind."""
    turn: Counter[str] = Counter()
    shares = {}
    for fault in chosen:
        turn[fault.kind] += 1
        shares[fault.number] = turn[fault.kind] / KINDS[fault.kind][1]
    return sorted(chosen, key=lambda fault: shares[fault.number])


def suffer(arena: Arena, fault: Fault) -> Outcome:
    started = time.monotonic()
    why = ""
    try:
        KINDS[fault.kind][0](Judge(arena, fault))
        outcome = "survived"
    except Refused as refusal:
        outcome, why = "refused", str(refusal)
    except Skipped as reason:
        outcome, why = "skipped", str(reason)
    except Lost as loss:
        outcome, why = "lost", str(loss)
    except Exception as error:  # the run left something that cannot even be compared
        outcome, why = "lost", f"{type(error).__name__}: {error}"
    seconds = round(time.monotonic() - started, 2)
    return Outcome(fault.number, fault.kind, fault.subject, outcome, fault.told, why, seconds)


def outcomes(file: Path) -> dict[int, Outcome]:
    """What a campaign has found so far, by number."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {outcome.number: outcome for outcome in (Outcome(**json.loads(line)) for line in lines)}


def table(found: list[Outcome], seed: int, planned: int) -> str:
    """The campaign as a page: kind, tried, survived, refused, lost; every lost one with the command that repeats it."""
    from ftrun.runs.lockfile import processor, version

    rows = ["| fault | tried | survived | refused | lost |", "| --- | --: | --: | --: | --: |"]
    total: Counter[str] = Counter()
    for name in KINDS:
        counts = Counter(outcome.outcome for outcome in found if outcome.kind == name)
        tried = sum(counts.values()) - counts["skipped"]
        if tried:
            rows.append(f"| {name} | {tried} | {counts['survived']} | {counts['refused']} | {counts['lost']} |")
        total += counts
    tried = sum(total.values()) - total["skipped"]
    rows.append(f"| **all** | **{tried}** | **{total['survived']}** | **{total['refused']}** | **{total['lost']}** |")
    skipped = sorted({f"{outcome.kind}: {outcome.why}" for outcome in found if outcome.outcome == "skipped"})
    lost = [
        f"- {outcome.kind} ({outcome.subject}, {json.dumps(outcome.told)}): {outcome.why.splitlines()[0]}  \n"
        f"  `python scripts/torture.py --seed {seed} --only {outcome.number}`"
        for outcome in found
        if outcome.outcome == "lost"
    ]
    machine = f"{processor()}, {platform.system()} {platform.release()}, torch {version('torch')}, one thread a process, seed {seed}"
    parts = [
        "# Accidents",
        __doc__.split("\n\n")[0] if __doc__ else "",
        "Survived: the run went on to the same bits as the undisturbed one, in trained weights, losses, selected rows and\n"
        "evaluations. Refused: it ended with one clear line and the right exit code, naming the file or the process.",
        f"Tried: {tried} of {planned - total['skipped']}. Machine: {machine}.",
        "\n".join(rows),
        *(["Not tried here:\n\n" + "\n".join(f"- {line}" for line in skipped)] if skipped else []),
        *(["Lost:\n\n" + "\n".join(lost)] if lost else []),
        "Generated by `python scripts/torture.py --table docs/torture.md`.",
        "## Twenty thousand steps\n\n![Memory, open files and the time of a step](soak.svg)\n\n"
        "A tiny model, one row a step, a checkpoint and a held-out loss every 200 steps; the numbers are in\n"
        "[soak.json](soak.json). Drawn by `python scripts/soak.py --json docs/soak.json --svg docs/soak.svg`, which fails\n"
        "where memory, open files or the time of a step grow.",
    ]
    return "\n\n".join(parts) + "\n"


def campaign(
    work: Path, seed: int, faults_: list[Fault], seconds: float = math.inf, again: bool = False
) -> list[Outcome]:
    """Suffer these faults, those that a state file knows left out; stops when the time is over."""
    arena, state = Arena(work), work / f"outcomes-{seed}.jsonl"
    known = {} if again else outcomes(state)
    started = time.monotonic()
    for fault in _all_kinds_alike(faults_):
        if fault.number in known or time.monotonic() - started > seconds:
            continue
        outcome = suffer(arena, fault)
        known[fault.number] = outcome
        with state.open("a") as lines:
            lines.write(json.dumps(asdict(outcome)) + "\n")
        print(
            f"{fault.number:4} {outcome.outcome:8} {outcome.seconds:5.1f} s  {fault.kind} ({fault.subject}) {outcome.told}",
            flush=True,
        )
        if outcome.outcome == "lost":
            print(f"     {outcome.why}", flush=True)
    return [known[fault.number] for fault in faults_ if fault.number in known]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("torture"), help="folder of the campaign; it goes on where it was"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop beginning faults after this time")
    parser.add_argument("--only", type=int, nargs="+", help="these faults again, by number")
    parser.add_argument("--numbers", type=int, nargs=2, help="only those from one number to another")
    parser.add_argument("--kind", help="only kinds whose name holds this")
    parser.add_argument("--short", type=int, help="this many faults, of every kind")
    parser.add_argument("--table", type=Path, help="write the table here, of what was tried so far")
    options = parser.parse_args()
    with _one_thread():
        chosen = plan(options.seed, options.short)
        if options.only:
            chosen = [fault for fault in chosen if fault.number in options.only]
        if options.numbers:
            chosen = [fault for fault in chosen if options.numbers[0] <= fault.number <= options.numbers[1]]
        if options.kind:
            chosen = [fault for fault in chosen if options.kind in fault.kind]
        found = campaign(options.work, options.seed, chosen, options.seconds, again=bool(options.only))
    page = table(found, options.seed, len(chosen))
    print(page)
    if options.table:
        options.table.write_text(page)
    sys.exit(any(outcome.outcome == "lost" for outcome in found))


if __name__ == "__main__":
    main()
