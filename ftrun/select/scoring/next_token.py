"""What a model would say next: the probabilities of a few words, for scorers that ask it a question."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

TOP = 2


@dataclass
class NextToken:
    """Probabilities of the next token of some texts."""

    asked: np.ndarray  # (texts, groups) of each group of ids, summed over its ids
    top: np.ndarray  # (texts, 2) of the two most likely tokens, the first one first
    top_ids: np.ndarray  # (texts, 2) their ids


def next_token(texts: list[list[int]], groups: list[list[int]], ctx: Context, title: str) -> NextToken:
    """What the scoring model would write behind each text (token ids); ``groups`` are ids whose probabilities add up."""
    made = [Sequence(np.array(ids, np.int32), np.ones(len(ids), np.float32), row) for row, ids in enumerate(texts)]
    name = f"next-{hashlib.blake2b(repr(groups).encode(), digest_size=6).hexdigest()}"

    def measure(bundle: Bundle, batch: Batch) -> list[np.ndarray]:
        return _measure(bundle, batch, groups)

    found = ctx.scorer.measure(TokenTable.from_sequences(made), name, measure, title, packable=True)
    values = np.stack(found) if found else np.zeros((0, len(groups) + 2 * TOP), np.float32)
    asked, top, ids = np.split(values, [len(groups), len(groups) + TOP], axis=1)
    return NextToken(asked.astype(np.float64), top.astype(np.float64), ids.astype(np.int64))


def word_ids(tokenizer: Any, word: str) -> list[int]:
    """Ids of the tokens that write this word at the start of an answer, with and without a blank in front.

    Raises ConfigError where the tokenizer has no token of its own for it.
    """
    found = set()
    for text in (word, f" {word}"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if ids and tokenizer.decode(ids[-1:]).strip() == word:
            found.add(int(ids[-1]))
    if not found:
        raise ConfigError(
            f'the tokenizer of the scoring model has no token for "{word}"',
            todo="Score with another: select.model.path=...",
        )
    return sorted(found)


def chat_prompt(tokenizer: Any, system: str, user: str) -> list[int]:
    """Token ids of a question to the model, up to where it answers; plain lines without a chat template."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer(f"{system}\n\n{user}\n\nAnswer:").input_ids


def _measure(bundle: Bundle, batch: Batch, groups: list[list[int]]) -> list[np.ndarray]:
    """One array a sequence: the probability of each group, of the two likeliest tokens, and their ids."""
    flat = batch.sequence.reshape(-1)
    position = torch.arange(len(flat), device=flat.device)
    last = torch.zeros(batch.sequences, dtype=torch.long, device=flat.device)
    last.scatter_reduce_(0, flat[flat >= 0], position[flat >= 0], "amax")
    hidden = bundle.architecture.hidden_states(bundle.model, batch)
    states = hidden.reshape(-1, hidden.shape[-1])[last]
    probabilities = bundle.architecture.head(bundle.model).logits(states).float().softmax(-1)
    asked = torch.stack([probabilities[:, ids].sum(-1) for ids in groups], 1)
    top, ids = probabilities.topk(TOP, dim=-1)
    return list(torch.cat([asked, top, ids.to(top.dtype)], 1).cpu().numpy())
