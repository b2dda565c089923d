"""Answers that the scoring model writes to questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ftrun.data.render import Renderer
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import DataError
from ftrun.models.generation import Writer, stop_ids

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


def rollouts(
    prompts: list[list[int]], count: int, max_new_tokens: int, temperature: float, ctx: Context
) -> list[list[str]]:
    """``count`` answers to every prompt (token ids); equal prompts get equal answers.

    Draws follow from prompt, number and seed alone. Raises DataError for a prompt that leaves no room for an answer.
    """
    bundle = ctx.scorer.bundle
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > bundle.context_length:
        raise DataError(
            f"a question of {longest} tokens leaves no room for {max_new_tokens} more in the {bundle.context_length} "
            f"that {bundle.path} can attend to",
            todo="Lower select.max_new_tokens, or select.max_length to leave out such rows.",
        )
    stops = stop_ids(bundle, Renderer(bundle.tokenizer))
    made = [Sequence(np.array(ids, np.int32), np.ones(len(ids), np.float32), row) for row, ids in enumerate(prompts)]
    table = TokenTable.from_sequences(made)
    found: list[list[str]] = [[] for _ in prompts]
    for number in range(count):
        seed = ctx.seed * count + number
        writer = Writer(max_new_tokens=max_new_tokens, temperature=temperature)

        def write(bundle: Bundle, batch: Batch, writer: Writer = writer, seed: int = seed) -> list[np.ndarray]:
            asked = [batch.input_ids[row][real].tolist() for row, real in enumerate(batch.sequence >= 0)]
            return [np.array(ids) for ids in writer.generate(bundle, asked, stops, seed)]

        name = f"rollout-{max_new_tokens}-{temperature:g}-{seed}"
        answers = ctx.scorer.measure(table, name, write, f"write answer {number + 1} of {count}")
        for texts, ids in zip(found, answers, strict=True):
            words = [int(token) for token in ids if int(token) not in stops]
            texts.append(bundle.tokenizer.decode(words, skip_special_tokens=True).strip())
    return found
