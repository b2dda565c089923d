"""What a token policy does before training: it edits rows, weighs all tokens once, and remembers numbers of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ftrun.data.meanings import ROW
from ftrun.data.pool import Pool, load_pool
from ftrun.data.roles import ROLES
from ftrun.errors import ComponentError, ConfigError, DataError
from ftrun.runs.artifacts import cache_dir
from ftrun.select.run import written_beside
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.reuse import FILE, Lines, read_tokens, write_origin
from ftrun.tokens.several import Several

if TYPE_CHECKING:
    from ftrun.data.tokens import TokenTable
    from ftrun.training.context import Context

SCHEMA = pa.schema(
    {"id": pa.int64(), "position": pa.int64(), "token": pa.int64(), "score": pa.float64(), "weight": pa.float64()}
)
TOKENS_AT_ONCE = 1_000_000


def edit_rows(policy: TokenPolicy, pool: Pool, ctx: Context, name: str = "edited") -> Pool:
    """The rows that the policy makes of these, as selection/<name>.jsonl holds them; a resumed run reads them there.

    Their ids count from 0 anew; ``row`` of each says what it was made of. Raises DataError when none is left.
    """
    path = ctx.out / "selection" / f"{name}.jsonl"
    there = path.exists() if ctx.team.rank == 0 else False
    if not ctx.team.gather_object(there)[0]:
        rows = policy.edit(pool, ctx)  # every process draws the rows: some share the work of making them
        if ctx.team.rank == 0:
            with written_beside(path) as beside, beside.open("w") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            _run_through(rows)
    ctx.team.barrier()
    if not path.stat().st_size:
        raise DataError(
            f"tokens={ctx.settings.choice('tokens')} leaves none of {len(pool):,} {'held-out ' * (pool is ctx.heldout)}rows",
            f"data.path={ctx.settings.data.path}",
            "The log says why rows were left out.",
        )
    with path.open() as lines:  # a label that stays beside a conversation is no feedback on it
        form = "messages" if "messages" in json.loads(lines.readline()) else "auto"
    known = [name for name in ctx.settings.data.ignore if name in ROW]  # the user's own columns may be gone
    data = replace(ctx.settings.data, path=str(path), format=form, columns={}, ignore=known, weights=None, limit=None)
    edited = load_pool(data, cache_dir() / "data", ctx.seed)
    ctx.report.note(f"{len(edited):,} rows made of {len(pool):,}: {path}")
    return edited


def _run_through(rows: Iterator[Any]) -> None:
    for _ in rows:
        pass


def run_tokens(policy: TokenPolicy, table: TokenTable, ctx: Context) -> TokenTable:
    """The table with the policy's weights and what it remembers; selection/tokens.parquet says what became of every token.

    With ``tokens.from`` they are those of another run. A policy that works inside the step leaves the table as it is.
    """
    stored = read_tokens(ctx.settings.tokens.from_run, table, ctx) if ctx.settings.tokens.from_run else None
    if not (stored or policy.static or policy.remembers or policy.edits):
        return table
    scores, weights = np.full(len(table.input_ids), np.nan), np.asarray(table.loss_weight)
    parts = policy.policies if isinstance(policy, Several) else [policy]
    if stored:
        _check_methods(parts, stored.methods, ctx)
        scores, weights = stored.scores, stored.weights
    elif policy.static:
        _check_whole(table, ctx)
        scores, weights = policy.precompute(table, ctx)
    if not (len(scores) == len(weights) == len(table.input_ids)) or not np.isfinite(weights).all():
        raise ComponentError(f"tokens={ctx.settings.choice('tokens')} gives no weight to some tokens")
    weighed = table.with_weights(weights)
    if stored:
        weighed = weighed.with_remembered(stored.remembered)
        for part, name in zip(parts, ctx.settings.choices("tokens"), strict=True):
            if part.remembers and name not in stored.methods:  # that run did not ask for it
                weighed = weighed.with_remembered(part.remember(weighed, ctx))
    elif policy.remembers:
        weighed = weighed.with_remembered(policy.remember(weighed, ctx))
    if ctx.team.rank == 0:
        write_tokens(ctx.out / "selection" / FILE, weighed, scores)
        write_origin(ctx.out / "selection", ctx)
    if stored or policy.static:
        _tell(table, weighed, ctx)
    return _without_empty(weighed, ctx) if policy.drops_empty else weighed


def _check_whole(table: TokenTable, ctx: Context) -> None:
    """Refuse rows that weigh their turns by more than yes or no: the policy would write over it. Raises DataError."""
    if not np.isin(table.loss_weight, (0, 1)).all():
        raise DataError(
            f"the rows give weights other than 0 and 1, and tokens={ctx.settings.choice('tokens')} sets its own",
            f"data.path={ctx.settings.data.path}",
            "Leave the row's weights out with data.ignore=[weight], write 0 or 1 in the turns, or use tokens=none.",
        )


def _check_methods(parts: list[TokenPolicy], methods: list[str], ctx: Context) -> None:
    """Refuse weights that another method made than one that was asked for. Raises ConfigError."""
    names = ctx.settings.choices("tokens")
    missing = [name for part, name in zip(parts, names, strict=True) if part.static and name not in methods]
    if missing:
        raise ConfigError(
            f"the weights there were made by {' and '.join(methods)}, not by {' and '.join(missing)}",
            f"tokens.from={ctx.settings.tokens.from_run}",
            f"Use tokens={methods[0]} or tokens=none with them, or leave tokens.from out.",
        )


def _tell(table: TokenTable, weighed: TokenTable, ctx: Context) -> None:
    before, after = table.trained_counts(), weighed.trained_counts()
    ctx.report.note(f"{int(after.sum())} of {int(before.sum())} trained tokens keep a weight")
    emptied = int(((before > 0) & (after == 0)).sum())
    if emptied:
        ctx.report.warn(
            f"{emptied} of {len(before)} sequences have no trained token left: they are read, and teach nothing"
        )


def _without_empty(table: TokenTable, ctx: Context) -> TokenTable:
    taught = table.trained_counts().reshape(len(table), -1).any(axis=1)
    if not taught.all():
        ctx.report.note(f"{int((~taught).sum())} of them are left out of training")
    return table.rows(np.flatnonzero(taught))


def write_tokens(path: Path, table: TokenTable, scores: np.ndarray) -> None:
    """One line a token, as `Lines` says; what the policy remembers of the tokens stands in further columns.

    The file's metadata tell under ``roles`` how many tokens of each role there are, how many of them have a weight, and
    the sum of those.
    """
    further = [pa.field(name, pa.float32()) for name in table.remembered]
    schema = pa.schema([*SCHEMA, *further])
    lines = Lines.of(table)
    if table.role is not None:
        schema = schema.with_metadata({"roles": json.dumps(_by_role(table, lines))})
    with written_beside(path) as beside, pq.ParquetWriter(beside, schema) as writer:
        for first in range(0, len(lines.tokens), TOKENS_AT_ONCE):
            part = slice(first, first + TOKENS_AT_ONCE)
            tokens = lines.tokens[part]
            columns = [
                pa.array(lines.ids[part], pa.int64()),
                pa.array(lines.positions[part], pa.int64()),
                pa.array(table.input_ids[tokens], pa.int64()),
                pa.array(scores[tokens].astype(np.float64), pa.float64(), from_pandas=True),  # NaN as null
                pa.array(table.loss_weight[tokens].astype(np.float64), pa.float64()),
                *(pa.array(values[tokens], pa.float32(), from_pandas=True) for values in table.remembered.values()),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _by_role(table: TokenTable, lines: Lines) -> dict[str, dict[str, float]]:
    assert table.role is not None
    role, weight = table.role[lines.tokens], np.asarray(table.loss_weight[lines.tokens], np.float64)
    numbers = {"tokens": np.ones_like(weight), "kept": weight != 0, "weight": weight}
    sums = {name: np.bincount(role, values, len(ROLES)).tolist() for name, values in numbers.items()}
    return {role: {name: values[at] for name, values in sums.items()} for at, role in enumerate(ROLES)}
