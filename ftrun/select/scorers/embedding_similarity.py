"""Targeted selection by sentence embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Scorer
from ftrun.select.geometry.embed import embed_rows
from ftrun.select.geometry.nearest import nearest_query, similarities, split_scored
from ftrun.select.queries import load_queries

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context


@register("select", "embedding_similarity")
@dataclass
class EmbeddingSimilarity(Scorer):
    """Rows whose sentence embeddings are like those of the queries (Nayak et al., 2026, "embed", arXiv:2602.14696).

    S[q, z] = e_q . e_z with unit vectors e, the mean over a text's tokens of an encoder's last states; a row's score
    is its highest over the queries. The representation is one of three that go with every targeted picker; the others
    are rds_plus (states of the language model) and less (its gradients).
    """

    embedding: Literal["minilm", "model"] = "minilm"  # all-MiniLM-L6-v2, or the mean hidden state of the scoring model
    of: Literal["prompt", "row"] = "row"  # text that is embedded

    column: ClassVar[str] = "similarity"
    own_picker: ClassVar[str] = "round_robin"
    gives_similarity: ClassVar[bool] = True

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Similarity to the nearest query, (rows,), from -1 to 1; NaN for a row without text."""
        queries = load_queries(ctx.settings)
        vectors = embed_rows(chain(pool, queries), ctx, self.embedding, self.of)
        rows, wanted, known = split_scored(vectors, pool, queries, "no text", ctx)
        similarity = similarities(wanted, rows, queries.task, ctx)
        ctx.scorer.embeddings, ctx.scorer.similarity = rows, similarity
        return {"similarity": nearest_query(similarity, known)}
