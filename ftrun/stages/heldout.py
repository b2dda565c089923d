"""The rows that an evaluation of a finished run, or of a plain model, asks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from ftrun.config.keys import names
from ftrun.config.settings import DataConfig, Settings
from ftrun.data.pool import Pool, limit_heldout, load_pool, refuse_idle_split, split_heldout
from ftrun.errors import ConfigError
from ftrun.training.context import Context

SOURCE = ("data.path", "data.split", "data.heldout_path")  # keys that name the rows to evaluate
SHIFTING = ("data.weights", "data.limit")  # keys after which a row may have another number


def settle(data: DataConfig, keys: Collection[str]) -> DataConfig:
    """The data settings of an evaluation whose command line names ``keys``: named rows are evaluated whole.

    What a run said of its own rows alone does not reach to named ones: which part it used, and which it held out.
    """
    if "data.heldout_path" not in keys and {"data", "data.path", "data.split"} & set(keys):
        data = replace(data, heldout_path=None)
    if "data.path" in keys:
        fresh = DataConfig()
        own = {key: getattr(fresh, key) for key in ("weights", "limit", "split") if f"data.{key}" not in keys}
        data = replace(data, **own)
    return data


def evaluated_rows(settings: Settings, own: Settings | None, keys: Collection[str], work: Path, ctx: Context) -> Pool:
    """The rows to evaluate: those that were named, whole; else those that the run held out.

    ``own``: the settings of the run; None for a plain model, of whose data every row is evaluated.
    """
    data, seed = settings.data, settings.seed
    if data.heldout_path:
        rows = load_pool(replace(data, path=data.heldout_path, weights=None, limit=None), work / "heldout", seed)
    elif own is None or names(keys, *SOURCE) or "data" in keys:
        rows = load_pool(data, work, seed)
    else:
        rows = _held_out(settings, own, keys, work)
    if "data.split" in keys:
        refuse_idle_split(rows, replace(data, path=data.heldout_path or data.path))
    for note in rows.notes:
        ctx.report.note(note)
    named_whole = names(keys, *SOURCE) and "data.heldout_limit" not in keys
    kept = rows if named_whole else limit_heldout(rows, data.heldout_limit, seed)
    of = f" of {len(rows):,}" if len(kept) < len(rows) else ""
    ctx.report.note(f"{len(kept):,}{of} row{'s' * (len(kept) != 1)} to evaluate")
    return kept


def _held_out(settings: Settings, own: Settings, keys: Collection[str], work: Path) -> Pool:
    """The rows that the run held out, read as ``settings`` say; never one that it has trained on."""
    if shifting := [key for key in SHIFTING if key in keys]:
        raise ConfigError(
            f"{shifting[0]} says which rows the run had, and with them which it held out",
            shifting[0],
            "Name other rows with data.path=FILE, or fewer with data.heldout_limit=N.",
        )
    held = split_heldout(load_pool(own.data, work, own.seed), own.data.heldout, own.seed)[1]
    if replace(settings.data, heldout_limit=own.data.heldout_limit) == own.data:
        return held
    # the split goes by what a row says, which other settings may change: the row's number does not
    again = load_pool(settings.data, work, settings.seed)
    return again.subset(held.ids[np.isin(held.ids, again.ids)])
