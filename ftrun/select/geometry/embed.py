"""Sentence embeddings of the rows of a pool."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np

from ftrun.config.settings import ModelConfig
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.models.load import load_bundle
from ftrun.select.scoring.texts import added_ids
from ftrun.training.scoring import Scoring

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.data.records import Record
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

MINILM_LENGTH = 256  # tokens that all-MiniLM-L6-v2 was trained to read; longer texts are embedded by their beginning


def embed_rows(
    pool: Iterable[Record],
    ctx: Context,
    model: Literal["minilm", "model"] = "minilm",
    of: Literal["prompt", "row"] = "row",
) -> np.ndarray:
    """Mean of the last hidden states over the tokens of each row, scaled to length 1, (rows, width) float32.

    A row without text gets zeros. Long texts are embedded by their beginning, and the report says how many.
    """
    scoring = ctx.scorer if model == "model" else _encoder(ctx)
    limit = scoring.bundle.context_length if model == "model" else min(MINILM_LENGTH, scoring.bundle.context_length)
    texts = ["\n".join(_prompt_text(record) if of == "prompt" else record.texts) for record in pool]
    return embed_texts(texts, scoring, limit)


def embed_pieces(
    records: Iterable[Record], ctx: Context, model: Literal["minilm", "model"], characters: int
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the texts of the records, cut into pieces of so many characters.

    Vectors as `embed_rows` makes them, (pieces, width), and the record that each piece belongs to, (pieces,).
    """
    scoring = ctx.scorer if model == "model" else _encoder(ctx)
    limit = scoring.bundle.context_length if model == "model" else min(MINILM_LENGTH, scoring.bundle.context_length)
    pieces: list[str] = []
    owner: list[int] = []
    for number, record in enumerate(records):
        text = "\n".join(record.texts)
        parts = [text[start : start + characters] for start in range(0, len(text), characters)]
        filled = [part for part in parts if part.strip()]
        pieces += filled
        owner += [number] * len(filled)
    return embed_texts(pieces, scoring, limit), np.array(owner, np.int64)


def embed_texts(texts: list[str], scoring: Scoring, limit: int) -> np.ndarray:
    """Embeddings of these texts by the model of ``scoring``, unit length, (texts, width) float32."""
    tokenizer = scoring.bundle.tokenizer
    lead, tail = added_ids(tokenizer)
    room = limit - len(lead) - len(tail)
    plain = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    filled = [number for number, ids in enumerate(plain) if ids]
    cut = sum(len(ids) > room for ids in plain)
    if cut:
        scoring.report.note(f"{cut} of {len(texts)} texts are embedded by their first {limit} tokens")
    sequences = [_sequence([*lead, *plain[number][:room], *tail], number) for number in filled]
    vectors = scoring.measure(TokenTable.from_sequences(sequences), "embedding", _mean_of_batch)
    width = len(vectors[0]) if vectors else 1
    result = np.zeros((len(texts), width), np.float32)
    for number, vector in zip(filled, vectors, strict=True):
        result[number] = vector / max(float(np.linalg.norm(vector.astype(np.float64))), 1e-12)
    return result


def _encoder(ctx: Context) -> Scoring:
    return ctx.scorer.with_model(
        lambda: load_bundle(ModelConfig(path="builtin:minilm"), task="classify", device=ctx.team.device)
    )


def _mean_of_batch(bundle: Bundle, batch: Batch) -> list[np.ndarray]:
    """Mean over the real tokens of each sequence; batches here hold one sequence a row."""
    hidden = bundle.architecture.hidden_states(bundle.model, batch).float()
    real = batch.attention_mask.unsqueeze(-1).to(hidden.dtype)
    means = (hidden * real).sum(1) / real.sum(1)
    return list(means.cpu().numpy())


def _prompt_text(record: Record) -> list[str]:
    """What the user says; the whole text of a row that is no conversation."""
    said = [message.content for message in record.messages if message.role == "user" and message.content]
    return said or record.texts


def _sequence(ids: list[int], number: int) -> Sequence:
    return Sequence(np.array(ids, np.int32), np.ones(len(ids), np.float32), number)
