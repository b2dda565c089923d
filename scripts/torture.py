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

    def __init__(self, work: Path):
        self.work = work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.notes = self.work / "notes"
        self.model, self.rows = self.work / "model", self.work / "rows.jsonl"
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
        with (self.work / "said").open("wb") as stream:
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
        said = (self.work / "said").read_text(errors="replace")
        if alive and code is not None:
            said += f"\nprocesses {alive} outlived the command"
            code = None
        return Ended(code, said)

    def alive(self) -> list[int]:
        """Processes of the last command that still run."""
        found = []
        for note in self.notes.glob("*.pid"):
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{note.stem}/stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX":
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
    every = judge.draw.random() < 0.25
    where = judge.draw.random()
    judge.told |= {"file": file, "how": how, "where": round(where, 4), "checkpoints": "all" if every else "newest"}
    for checkpoint in checkpoints if every else checkpoints[-1:]:
        faults.damage(checkpoint / file, how, where)
    judge.comes_out_the_same((str(folder),) if every else ())


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


def table(found: list[Outcome], seed: int) -> str:
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
        f"Machine: {machine}.",
        "\n".join(rows),
        *(["Not tried here:\n\n" + "\n".join(f"- {line}" for line in skipped)] if skipped else []),
        *(["Lost:\n\n" + "\n".join(lost)] if lost else []),
        "Generated by `python scripts/torture.py`.",
    ]
    return "\n\n".join(parts) + "\n"


def campaign(
    work: Path, seed: int, faults_: list[Fault], seconds: float = math.inf, again: bool = False
) -> list[Outcome]:
    """Suffer these faults, those that a state file knows left out; stops when the time is over."""
    arena, state = Arena(work), work / f"outcomes-{seed}.jsonl"
    known = {} if again else outcomes(state)
    started = time.monotonic()
    for fault in faults_:
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
    parser.add_argument("--kind", help="only kinds whose name holds this")
    parser.add_argument("--short", type=int, help="this many faults, of every kind")
    parser.add_argument("--table", type=Path, help="write the table here when nothing is left to try")
    options = parser.parse_args()
    with _one_thread():
        chosen = plan(options.seed, options.short)
        if options.only:
            chosen = [fault for fault in chosen if fault.number in options.only]
        if options.kind:
            chosen = [fault for fault in chosen if options.kind in fault.kind]
        found = campaign(options.work, options.seed, chosen, options.seconds, again=bool(options.only))
    page = table(found, options.seed)
    print(page)
    if options.table and len(found) == len(chosen):
        options.table.write_text(page)
    sys.exit(any(outcome.outcome == "lost" for outcome in found))


if __name__ == "__main__":
    main()
