"""Bounds of values that a type cannot say."""

from __future__ import annotations

import math
import re

from ftrun.config.recipes import FIDELITIES
from ftrun.config.settings import Settings
from ftrun.errors import ConfigError, nearest

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
    "launch": ("processes", "nodes", "threads"),
    "select": ("batch_tokens",),
}


def check_values(settings: Settings) -> None:
    """Raise ConfigError for a number out of its range, or keys that contradict each other."""
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
    if not 0 <= settings.launch.node_rank < settings.launch.nodes:
        rank = settings.launch.node_rank
        raise ConfigError(
            f"launch.node_rank counts machines from 0, and there are {settings.launch.nodes}",
            f"launch.node_rank={rank}",
        )
    if settings.launch.nodes > 1 and not settings.launch.port:
        raise ConfigError(
            "several machines must agree on a port", "launch.port=0", "Set launch.port, for example to 29500."
        )
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
    _check_mixture(settings)
    parse_budget(settings.budget)


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
