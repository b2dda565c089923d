"""Who says a token: the prompt, or an answer in it, for reports on which tokens a method keeps."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ftrun.data.records import Record
from ftrun.data.render import Renderer, TrainOn

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.data.tokens import TokenTable

ROLES = ("prompt", "answer")
BATCH = 256  # rows tokenised at a time


def with_roles(table: TokenTable, pool: Pool, tokenizer: Any, train_on: TrainOn) -> TokenTable:
    """The table of a pool's conversations, as it was prepared, with the role of every token; of texts, as it is.

    An answer's role begins behind the generation prompt and ends with its end of turn.
    """
    if pool.kind not in ("sft", "binary", "pairs"):
        return table
    if train_on != "all" or pool.kind == "pairs":
        return table.with_role(np.asarray(table.loss_weight) > 0)
    answers = np.zeros(len(table.input_ids), bool)
    rows = ((index, pool[int(id)]) for index, id in enumerate(table.record))
    while batch := list(islice(rows, BATCH)):
        records = [_unweighed(record) for _, record in batch]
        rendered = Renderer(tokenizer).batch(records, [pool.origin(record.id) for record in records])
        for (index, _), (sequence,) in zip(batch, rendered, strict=True):
            start, end = table.offsets[index], table.offsets[index + 1]
            answers[start:end] = sequence.loss_weight[: end - start] > 0
    return table.with_role(answers)


def _unweighed(record: Record) -> Record:
    """The record as if it said nothing of what is trained: every answer is one."""
    return replace(record, messages=tuple(replace(turn, weight=None) for turn in record.messages))
