"""The rows that a token policy has edited, and which of their characters each token stands for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ftrun.data.records import Record
from ftrun.errors import ConfigError

if TYPE_CHECKING:
    from ftrun.data.records import Record
    from ftrun.training.context import Context


def edited_rows(ctx: Context) -> list[dict[str, Any]]:
    """The rows of selection/edited.jsonl; a row's place is the ``record`` of its tokens."""
    with (ctx.out / "selection" / "edited.jsonl").open() as lines:
        return [json.loads(line) for line in lines]


def token_ends(tokenizer: Any, text: str, ids: np.ndarray, special: bool = False) -> np.ndarray | None:
    """Character of ``text`` after which each token ends, (tokens,), -1 for tokens that the tokenizer adds to a text.

    None where ``text`` has other tokens than ``ids``. ``special``: the text is tokenised with what the tokenizer adds.
    Raises ConfigError for a tokenizer that does not tell the places of its tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "the tokenizer does not tell which characters its tokens stand for",
            f"a {type(tokenizer).__name__}",
            "Use a model with a fast tokenizer (a tokenizer.json).",
        )
    found = tokenizer(text, add_special_tokens=special, truncation=False, verbose=False, return_offsets_mapping=True)
    if not np.array_equal(found["input_ids"], ids):
        return None
    return np.array([end if end > start or start > 0 else -1 for start, end in found["offset_mapping"]], np.int64)


EDIT_SOURCE, EDIT_TARGET = "edit_source", "edit_target"  # columns of edited rows, for eval=edit_span


SOURCE = "source"  # column of an edited row: the text with its errors


def with_prompt(record: Record, text: str) -> Record:
    """The row with another last prompt, or another text."""
    if record.kind == "labels":
        return replace(record, text=text)
    last = max(at for at, message in enumerate(record.prompt) if message.role == "user")
    messages = list(record.messages)
    messages[last] = replace(messages[last], content=text)
    return replace(record, messages=tuple(messages))
