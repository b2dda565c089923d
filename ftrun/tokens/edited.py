"""The rows that a token policy has edited, and which of their characters each token stands for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from ftrun.errors import ConfigError

if TYPE_CHECKING:
    from ftrun.runs.context import Context


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
