"""Targeted selection by the states of the language model itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Scorer
from ftrun.select.geometry.nearest import nearest_query, similarities, split_scored
from ftrun.select.queries import load_queries
from ftrun.select.scoring.texts import added_ids, chat_text, encode

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.data.pool import Pool
    from ftrun.data.records import Message, Record
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@register("select", "rds_plus")
@dataclass
class RdsPlus(Scorer):
    """Rows whose states in the model are like those of the queries (Ivison et al., 2025, "RDS+", arXiv:2503.01807).

    e = sum_i w_i h_i / |.| with w_i = i / sum_j j over all tokens i of a row, prompt and response, where h_i are the
    states after the last norm. S[q, z] = e_q . e_z, and a row's score is its highest over the queries. The queries of
    `select.queries` then take rows in turn (picker round_robin); with several files the tasks do.
    """

    template: Literal["tulu", "chat"] = "tulu"  # role tags on lines of their own, or the tokenizer's own chat template
    max_length: int = 2048  # tokens of a row or query that are read, from its start
    pooling: Literal["weighted_mean", "mean"] = "weighted_mean"  # later tokens weigh more, or all the same
    query_tokens: Literal["apart", "whole"] = (
        "apart"  # tokenise a query's last answer apart from what is before, or not
    )

    column: ClassVar[str] = "similarity"
    passes: ClassVar[float] = 1.0
    own_picker: ClassVar[str] = "round_robin"
    gives_similarity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.max_length > 0:
            raise ConfigError("max_length must be above 0", f"select.max_length={self.max_length}")

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Similarity to the nearest query, (rows,), from -1 to 1; NaN for a row without text."""
        queries = load_queries(ctx.settings)
        ids = [
            *self.token_ids(pool, ctx, apart=False),
            *self.token_ids(queries, ctx, apart=self.query_tokens == "apart"),
        ]
        rows, wanted, known = split_scored(self._embed(ids, ctx), pool, queries, "no text", ctx)
        similarity = similarities(wanted, rows, queries.task, ctx)
        ctx.scorer.embeddings, ctx.scorer.similarity = rows, similarity
        return {"similarity": nearest_query(similarity, known)}

    def token_ids(self, records: Iterable[Record], ctx: Context, apart: bool) -> list[list[int]]:
        """Tokens of each record as a conversation, those past ``max_length`` left off; empty where it says nothing."""
        tokenizer = ctx.scorer.tokenizer
        lead = [] if self.template == "chat" else added_ids(tokenizer)[0]  # a chat template writes its own
        halves = [self._halves(record, tokenizer) for record in records]
        if not apart:
            halves = [(before + answer, "") for before, answer in halves]
        first = encode(tokenizer, [before for before, _ in halves])
        last = encode(tokenizer, [answer for _, answer in halves])
        ids = [lead + a + b if a or b else [] for a, b in zip(first, last, strict=True)]
        cut = sum(len(row) > self.max_length for row in ids)
        if cut:
            ctx.report.note(f"{cut} of {len(ids)} texts are read up to max_length={self.max_length} only")
        return [row[: self.max_length] for row in ids]

    def _halves(self, record: Record, tokenizer: Any) -> tuple[str, str]:
        """The text before the last answer, and that answer with its end mark; a text that is no conversation has no second."""
        end = tokenizer.eos_token or ""
        messages = (*record.messages, *record.chosen)
        if not any(message.content for message in messages):
            text = "\n".join(part for part in (record.text, record.text_pair) if part)
            return (text + end if text else ""), ""
        if messages[-1].role != "assistant":
            return self._rendered(record, messages, False, tokenizer, end), ""
        before = self._rendered(record, messages[:-1], True, tokenizer, end)
        whole = self._rendered(record, messages, False, tokenizer, end)
        return (before, whole.removeprefix(before)) if whole.startswith(before) else (whole, "")

    def _rendered(self, record: Record, messages: tuple[Message, ...], asks: bool, tokenizer: Any, end: str) -> str:
        """A conversation as text; ``asks`` adds what introduces an answer."""
        if self.template == "chat":
            return chat_text(record, messages, asks, tokenizer, "tulu")
        text = ""
        for message in messages:
            closing = end if message.role == "assistant" else ""
            text += f"<|{message.role}|>\n{message.content.strip()}{closing}\n"
        return text + "<|assistant|>\n" if asks else text.rstrip()

    def _embed(self, ids: list[list[int]], ctx: Context) -> np.ndarray:
        """Unit vectors of the texts, (texts, width) float32; zeros for an empty one."""
        filled = [number for number, row in enumerate(ids) if row]
        table = TokenTable.from_sequences(
            [Sequence(np.array(ids[n], np.int32), np.ones(len(ids[n]), np.float32), n) for n in filled]
        )
        compute = weighted_mean_states if self.pooling == "weighted_mean" else mean_states
        vectors = ctx.scorer.measure(table, f"states-{self.pooling}", compute, "embed rows and queries", packable=True)
        result = np.zeros((len(ids), len(vectors[0]) if vectors else 1), np.float32)
        for number, vector in zip(filled, vectors, strict=True):
            result[number] = vector / max(float(np.linalg.norm(vector.astype(np.float64))), 1e-12)
        return result


def weighted_mean_states(bundle: Bundle, batch: Batch) -> list[np.ndarray]:
    """sum_i w_i h_i with w_i = i / sum_j j over the tokens i of each sequence, from 1."""
    means = []
    for states in _states(bundle, batch):
        place = torch.arange(1, len(states) + 1, dtype=torch.float32, device=states.device)
        means.append((place / place.sum() @ states).cpu().numpy())
    return means


def mean_states(bundle: Bundle, batch: Batch) -> list[np.ndarray]:
    """The mean over the tokens of each sequence."""
    return [states.mean(0).cpu().numpy() for states in _states(bundle, batch)]


def _states(bundle: Bundle, batch: Batch) -> list[torch.Tensor]:
    """States after the last norm of each sequence, (its tokens, width) float32; padding is left out."""
    hidden = bundle.architecture.hidden_states(bundle.model, batch).float()
    return [hidden[batch.sequence == number] for number in range(batch.sequences)]
