"""Token weights that another run has stored, for ``tokens.from=RUN``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from ftrun.errors import ConfigError, DataError
from ftrun.runs.artifacts import digest, write_json

if TYPE_CHECKING:
    from ftrun.data.tokens import TokenTable
    from ftrun.training.context import Context

FILE, ORIGIN = "tokens.parquet", "tokens.json"
PLAIN = ("id", "position", "token", "score", "weight")


@dataclass(frozen=True)
class Lines:
    """Which tokens of a table are lines of tokens.parquet, in its order.

    The token that a piece of a text repeats from the piece before is one token of the row, written once.
    """

    tokens: np.ndarray  # (lines,) index in the table
    ids: np.ndarray  # (lines,) row
    positions: np.ndarray  # (lines,) from 0 in its row; a pair counts on from chosen to rejected

    @classmethod
    def of(cls, table: TokenTable) -> Lines:
        repeated = np.zeros(len(table.input_ids), bool)
        repeated[table.offsets[:-1][table.continues]] = True
        tokens = np.flatnonzero(~repeated)
        ids = np.repeat(table.record, table.lengths)[tokens]
        starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))  # first line of every row
        return cls(tokens, ids, np.arange(len(tokens)) - np.repeat(starts, np.diff(starts, append=len(tokens))))


@dataclass(frozen=True)
class Stored:
    """What a run has stored of the tokens of a table, (tokens,) each."""

    methods: list[str]  # token policies that made it
    scores: np.ndarray
    weights: np.ndarray
    remembered: dict[str, np.ndarray]


def write_origin(folder: Path, ctx: Context) -> None:
    """Say beside tokens.parquet what its weights were made of."""
    write_json(folder / ORIGIN, _origin(ctx))


def read_tokens(run: str, table: TokenTable, ctx: Context) -> Stored:
    """The stored weights of the rows of ``table``, which may be fewer than the run had.

    Raises ConfigError where there are none, DataError where a row is missing or made of other tokens.
    """
    where = f"tokens.from={run}"
    folder = Path(run).expanduser() / "selection"
    if not (folder / FILE).is_file() or not (folder / ORIGIN).is_file():
        raise ConfigError(
            f"{run} holds no token weights",
            where,
            "Name the folder of a run with a token method that weighs tokens before training, such as token_cleaning.",
        )
    made: dict[str, Any] = json.loads((folder / ORIGIN).read_text())
    ours = _origin(ctx)
    if made.get("train_on", ours["train_on"]) != ours["train_on"]:
        raise DataError(
            f"the weights of {run} were made with data.train_on={made['train_on']}, and this run trains other tokens",
            f"data.train_on={ours['train_on']}",
            f"Use data.train_on={made['train_on']}, or let this run weigh its tokens itself.",
        )
    stored = pq.read_table(folder / FILE)
    columns = {name: stored.column(name).to_numpy() for name in stored.column_names}
    lines = Lines.of(table)
    at = _places(lines, columns["id"], columns["position"])
    fits = at >= 0
    fits[fits] = columns["token"][at[fits]] == table.input_ids[lines.tokens[fits]]
    if not fits.all():
        row = int(lines.ids[np.argmin(fits)])
        raise DataError(
            f"the weights of {run} are not for these tokens: row {row} {_reason(made, ours)}",
            where,
            "Use the same model, template and data, or let this run weigh its tokens itself.",
        )
    _check_whole(lines, at, columns["id"], where)

    def spread(name: str, empty: float) -> np.ndarray:
        values = np.full(len(table.input_ids), empty)
        values[lines.tokens] = columns[name][at]
        return values

    remembered = {name: spread(name, np.nan) for name in columns if name not in PLAIN}
    return Stored(made["methods"], spread("score", np.nan), spread("weight", 0.0), remembered)


def _places(lines: Lines, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Line of the file for every line of the table; -1 where the file has none."""
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
    order = np.argsort(ids[starts], kind="stable")
    known = ids[starts][order]
    row = np.minimum(np.searchsorted(known, lines.ids), len(known) - 1)
    at = starts[order][row] + lines.positions
    there = (known[row] == lines.ids) & (at < len(ids))
    there[there] = (ids[at[there]] == lines.ids[there]) & (positions[at[there]] == lines.positions[there])
    return np.where(there, at, -1)


def _check_whole(lines: Lines, at: np.ndarray, ids: np.ndarray, where: str) -> None:
    """Refuse a row that goes on in the file after it has ended here: it was cut at another length."""
    last = np.append(np.flatnonzero(np.diff(lines.ids)), len(lines.ids) - 1)
    after = at[last] + 1
    goes_on = (after < len(ids)) & (ids[np.minimum(after, len(ids) - 1)] == lines.ids[last])
    if goes_on.any():
        row = int(lines.ids[last[np.argmax(goes_on)]])
        raise DataError(f"row {row} has more tokens there than here", where, "Use the data.max_length of that run.")


def _origin(ctx: Context) -> dict[str, Any]:
    bundle = ctx.bundle
    return {
        "methods": ctx.settings.choices("tokens"),
        "knobs": ctx.settings.slots["tokens"][1],
        "tokenizer": digest(sorted(bundle.tokenizer.get_vocab().items())) if bundle else None,
        "template": digest(getattr(bundle.tokenizer, "chat_template", None)) if bundle else None,
        "data": ctx.facts.get("data"),
        "train_on": ctx.settings.data.train_on,
    }


def _reason(made: dict[str, Any], ours: dict[str, Any]) -> str:
    other = [name for name in ("tokenizer", "template", "data") if made.get(name) != ours[name]]
    return f"differs, and so does the {' and the '.join(other)}" if other else "differs"
