"""What a scorer says of single tokens, kept beside the scores of the rows so that one row can be looked into later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ftrun.runs.artifacts import disk_guard

if TYPE_CHECKING:
    from ftrun.training.context import Context

TOKEN_SCORES = "token_scores.parquet"  # written by scorers that score tokens
TEXTS_AT_ONCE = 4096  # about a megabyte of token scores


@dataclass
class Scored:
    """Scores of tokens of one text. ``start``: place of the text's first token within its row, whose texts follow each other."""

    row: int  # id
    start: int
    position: np.ndarray  # (tokens,) in the text
    token: np.ndarray  # (tokens,) ids
    score: np.ndarray  # (tokens,)
    weight: np.ndarray | None = None  # (tokens,) how much each counts, from 0 to 1, where the method says so


def write_token_scores(texts: Iterable[Scored], ctx: Context) -> None:
    """One line a scored token, texts as they come, in the folder of the selection; a few thousand are in memory at a time.

    Only the first process writes, and only it goes through ``texts``.
    """
    if ctx.team.rank:
        return
    path = ctx.selection / TOKEN_SCORES
    names = _Names(ctx.scorer.tokenizer)
    writer: pq.ParquetWriter | None = None
    with disk_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}")
        try:
            block: list[Scored] = []
            for text in texts:
                block.append(text)
                if len(block) == TEXTS_AT_ONCE:
                    writer = _write(block, names, beside, writer)
                    block = []
            if block:
                writer = _write(block, names, beside, writer)
            if writer is not None:
                writer.close()
                beside.replace(path)
        finally:
            if writer is not None and writer.is_open:
                writer.close()
            beside.unlink(missing_ok=True)


class _Names:
    """Tokens as text, each decoded once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def column(self, ids: np.ndarray) -> pa.Array:
        kinds, number = np.unique(ids, return_inverse=True)
        for kind in kinds.tolist():
            if kind not in self.known:
                self.known[kind] = self.tokenizer.decode([kind])
        texts = pa.array([self.known[kind] for kind in kinds.tolist()], pa.string())
        return pa.DictionaryArray.from_arrays(pa.array(number.astype(np.int32)), texts)


def _write(block: list[Scored], names: _Names, path: Any, writer: pq.ParquetWriter | None) -> pq.ParquetWriter:
    sizes = [len(text.token) for text in block]
    columns = {
        "id": pa.array(np.repeat([text.row for text in block], sizes), pa.int64()),
        "position": pa.array(np.concatenate([text.start + text.position for text in block]), pa.int64()),
        "token": names.column(np.concatenate([text.token for text in block])),
        "score": pa.array(np.concatenate([text.score for text in block]), pa.float32()),
    }
    if block[0].weight is not None:
        weights = [text.weight for text in block if text.weight is not None]
        columns["weight"] = pa.array(np.concatenate(weights), pa.float32())
    table = pa.table(columns)
    writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
    writer.write_table(table)
    return writer
