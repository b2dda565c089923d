"""The static half of a token policy: weights of all tokens, once, before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ftrun.errors import ComponentError
from ftrun.select.run import written_beside
from ftrun.tokens.base import TokenPolicy

if TYPE_CHECKING:
    from ftrun.context import Context
    from ftrun.data.tokens import TokenTable

SCHEMA = pa.schema(
    {"id": pa.int64(), "position": pa.int64(), "token": pa.int64(), "score": pa.float64(), "weight": pa.float64()}
)
TOKENS_AT_ONCE = 1_000_000


def run_tokens(policy: TokenPolicy, table: TokenTable, ctx: Context) -> TokenTable:
    """The table with the policy's weights; selection/tokens.parquet says what became of every token.

    A policy that works inside the step leaves the table as it is.
    """
    if not policy.static:
        return table
    scores, weights = policy.precompute(table, ctx)
    if not (len(scores) == len(weights) == len(table.input_ids)) or not np.isfinite(weights).all():
        raise ComponentError(f"tokens={ctx.settings.choice('tokens')} gives no weight to some tokens")
    if ctx.team.rank == 0:
        write_tokens(ctx.out / "selection" / "tokens.parquet", table, scores, weights)
    weighed = table.with_weights(weights)
    before, after = table.trained_counts(), weighed.trained_counts()
    ctx.report.note(f"{int(after.sum())} of {int(before.sum())} trained tokens keep a weight")
    emptied = int(((before > 0) & (after == 0)).sum())
    if emptied:
        ctx.report.warn(
            f"{emptied} of {len(before)} sequences have no trained token left: they are read, and teach nothing"
        )
    return weighed


def write_tokens(path: Path, table: TokenTable, scores: np.ndarray, weights: np.ndarray) -> None:
    """One line a token; ``position`` counts from 0 in its row (a pair counts on from chosen to rejected).

    The token that a piece of a text repeats from the piece before is one token of the row, written once.
    """
    lengths = table.lengths
    repeated = np.zeros(len(table.input_ids), bool)
    repeated[table.offsets[:-1][table.continues]] = True
    lines = np.flatnonzero(~repeated)
    ids = np.repeat(table.record, lengths)[lines]
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))  # first line of every row
    positions = np.arange(len(lines)) - np.repeat(starts, np.diff(starts, append=len(lines)))
    with written_beside(path) as beside, pq.ParquetWriter(beside, SCHEMA) as writer:
        for first in range(0, len(lines), TOKENS_AT_ONCE):
            part = slice(first, first + TOKENS_AT_ONCE)
            tokens = lines[part]
            columns = [
                pa.array(ids[part], pa.int64()),
                pa.array(positions[part], pa.int64()),
                pa.array(table.input_ids[tokens], pa.int64()),
                pa.array(scores[tokens].astype(np.float64), pa.float64(), from_pandas=True),  # NaN as null
                pa.array(weights[tokens].astype(np.float64), pa.float64()),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))
