"""Bounds of values that a type cannot say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftrun.config.place import place
from ftrun.config.recipes import FIDELITIES
from ftrun.config.settings import LaunchConfig, Settings
from ftrun.errors import ConfigError, nearest
from ftrun.registry import JOINT, find

_POSITIVE = {
    "train": (
        "max_steps",
        "epochs",
        "batch_size",
        "batch_tokens",
        "log_steps",
        "save_steps",
        "keep_checkpoints",
        "eval_steps",
        "max_grad_norm",
    ),
    "data": ("max_length", "heldout_limit", "limit"),
    "launch": ("processes", "nodes", "threads", "timeout", "context_parallel"),
    "select": ("batch_tokens",),
}


@dataclass(frozen=True)
class Bounds:
    """The numbers that a knob can mean something with."""

    low: float
    high: float = math.inf
    above: bool = False  # the lower bound itself is out
    below: bool = False  # the upper bound itself is out

    def refusal(self, value: float) -> str | None:
        """What the number must be; None where it is."""
        fits = (value > self.low if self.above else value >= self.low) and (
            value < self.high if self.below or math.isinf(self.high) else value <= self.high
        )
        if fits:
            return None
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        if math.isinf(self.high):
            return f"{low} and finite" if math.isinf(value) else low
        return f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


NOT_NEGATIVE, COUNT, SHARE = Bounds(0), Bounds(1), Bounds(0, 1)
POSITIVE, BELOW_ONE = Bounds(0, above=True), Bounds(0, 1, below=True)
# what the standard names of the field mean, whichever component has them; its own bounds are its own matter
_BY_NAME = {
    r"(.*_)?learning_rate|learner_rate": NOT_NEGATIVE,
    r"weight_decay|eps|temperature|shots": NOT_NEGATIVE,
    r"beta[12]|(.*_)?dropout|label_smoothing": BELOW_ONE,
    r"(.*_)?r|lora_alpha": POSITIVE,
    r"(warmup_)?epochs": POSITIVE,
    r".+_epochs": NOT_NEGATIVE,  # of a part that may be left out
    r"(.*_)?(batch_size|batch_tokens|batches|max_steps|max_new_tokens|iterations|rounds|restarts|clusters)": COUNT,
    r"max_length|copies|heads|masks|seeds|num_virtual_tokens|candidates|probes|rollouts|interval": COUNT,
    r"(.*_)?share|(fim|replace)_rate": SHARE,
}
_BY_SLOT = {
    "optim": {r"momentum": BELOW_ONE},
    "schedule": {r"warmup|decay": NOT_NEGATIVE, r"minimum": SHARE},
    "adapter": {
        r"layers|r|loftq_iterations|n_frequency|topk|u|gralora_k|(.*_)?group_size|(.*_)?block_size": COUNT,
        r"num_(vectors|subspaces|virtual_tokens)|(vector|theta_d)_length|adapter_(len|layers)": COUNT,
        r"sparsity": BELOW_ONE,
        r"sparse_rate|weight_tying": SHARE,
    },
    "eval": {r"rows|k|limit": COUNT},
}


def _check_knobs(settings: Settings) -> None:
    """Refuse a component's number that means nothing under its name."""
    for slot, (name, knobs) in settings.slots.items():
        prefix = "select.picker" if slot == "picker" else slot
        for part in name.split(JOINT) if JOINT in name else [None]:
            asked = _asked(slot, part or name, knobs[part] if part else knobs)
            _check_numbers(slot, asked, f"{prefix}.{part}" if part else prefix)
    for name, knobs in settings.eval:
        _check_numbers("eval", knobs, f"eval.{name}")


def _asked(slot: str, name: str, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a component has by itself: its 0 may say that another knob decides."""
    known = find(slot, name).knobs
    return {knob: value for knob, value in knobs.items() if knob not in known or value != known[knob].default}


def _check_numbers(slot: str, knobs: Mapping[str, Any], prefix: str) -> None:
    for knob, value in knobs.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        key = f"{prefix}.{knob}"
        for pattern, bounds in [*_BY_SLOT.get(slot, {}).items(), *_BY_NAME.items()]:
            must = bounds.refusal(value) if re.fullmatch(pattern, knob) else None
            if must:
                raise ConfigError(f"{key} must be {must}, not {value}", f"{key}={value}")
        if slot == "schedule" and knob in ("warmup", "decay") and value > 1 and value != int(value):
            todo = "Below 1 it is a share of all steps, else a number of steps."
            raise ConfigError(f"{key} must be a share or a whole number, not {value}", f"{key}={value}", todo)


def check_values(settings: Settings, trains: bool = True) -> None:
    """Raise ConfigError for a number out of its range, or keys that contradict each other where the command ``trains``."""
    for section, names in _POSITIVE.items():
        for name in names:
            value = getattr(getattr(settings, section), name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{section}.{name} must be above 0, not {value}", f"{section}.{name}={value}")
    heldout = settings.data.heldout
    if not 0 <= heldout < 1:
        raise ConfigError(
            f"data.heldout is a share of the rows, from 0 to below 1, not {heldout}", f"data.heldout={heldout}"
        )
    train = settings.train
    if train.load_best and not (train.save_steps and train.eval_steps):
        todo = "Set both, to the same number."
        raise ConfigError("train.load_best needs train.save_steps and train.eval_steps", "train.load_best=true", todo)
    if train.load_best and train.save_steps and train.eval_steps and train.eval_steps % train.save_steps:
        raise ConfigError(
            "train.load_best needs a checkpoint at every evaluation",
            f"train.eval_steps={train.eval_steps} train.save_steps={train.save_steps}",
            "Make train.eval_steps a multiple of train.save_steps.",
        )
    processes = settings.launch.processes * settings.launch.nodes
    if trains and train.batch_size < processes:
        raise ConfigError(
            f"{processes} processes cannot share a step of {train.batch_size} rows",
            f"train.batch_size={train.batch_size}",
            f"Raise it to at least {processes}.",
        )
    _check_launch(settings.launch)
    if settings.seed < 0:
        raise ConfigError(f"seed must be 0 or above, not {settings.seed}", f"seed={settings.seed}")
    if not settings.stages:
        raise ConfigError("there is no stage to run", "stages=[]", "Use some of select, train, eval.")
    if settings.fidelity and settings.fidelity not in FIDELITIES:
        raise ConfigError(
            f'fidelity "{settings.fidelity}" is unknown',
            f"fidelity={settings.fidelity}",
            nearest(settings.fidelity, FIDELITIES),
        )
    if settings.select.dedup_threshold is not None and not 0 < settings.select.dedup_threshold <= 1:
        threshold = settings.select.dedup_threshold
        raise ConfigError(
            f"select.dedup_threshold is a similarity above 0, at most 1, not {threshold}",
            f"select.dedup_threshold={threshold}",
        )
    _check_places(settings)
    _check_knobs(settings)
    _check_mixture(settings)
    parse_budget(settings.budget)


def _check_places(settings: Settings) -> None:
    """Refuse what can be no file or folder; those of rows are looked at when they are read."""
    texts = {
        "out": settings.out,
        "model.path": settings.model.path,
        "model.template": settings.model.template,
        "select.model.path": settings.select.model_path,
        "tokens.from": settings.tokens.from_run,
    }
    for key, text in texts.items():
        if text is not None:
            if not text.strip():
                raise ConfigError(f"{key} names nothing", f'{key}="{text}"', "Give it a value, or leave it out.")
            place(text, key)


def _check_launch(launch: LaunchConfig) -> None:
    if launch.restarts < 0:
        raise ConfigError(
            f"launch.restarts must be 0 or above, not {launch.restarts}", f"launch.restarts={launch.restarts}"
        )
    if launch.rendezvous is not None:
        host, _, port = launch.rendezvous.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ConfigError(
                "launch.rendezvous is the address and port where the machines meet, host:port",
                f"launch.rendezvous={launch.rendezvous}",
                f"Write launch.rendezvous={(host if port.isdecimal() else launch.rendezvous) or 'HOST'}:29500",
            )


def _check_mixture(settings: Settings) -> None:
    weights, path = settings.data.weights, settings.data.path
    if weights is None:
        return
    sources = path if isinstance(path, list) else [path]
    if len(weights) != len(sources):
        what = f"data.weights has {len(weights)} numbers, but data.path has {len(sources)} sources"
        raise ConfigError(what, f"data.weights={weights}", "Give one weight a source.")
    if any(weight < 0 for weight in weights) or not sum(weights) > 0:
        raise ConfigError("data.weights must be 0 or above, and not all 0", f"data.weights={weights}")


def parse_budget(budget: int | float | str | None) -> tuple[str, float] | None:
    """A budget as ("share", 0.05), ("rows", 500) or ("tokens", 1e6).

    Raises ConfigError for anything else.
    """
    if isinstance(budget, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB]?)_?tokens?", budget.strip())
        if match and float(match[1]) > 0:
            return "tokens", float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()]
    elif budget is None:
        return None
    elif isinstance(budget, float) and 0 < budget <= 1:
        return "share", budget
    elif 1 <= budget < math.inf and budget == int(budget):
        return "rows", float(budget)
    todo = "Use a share (0.05), a number of rows (500), or tokens (1M_tokens)."
    raise ConfigError(f"budget {budget!r} is not a budget", f"budget={budget}", todo)
