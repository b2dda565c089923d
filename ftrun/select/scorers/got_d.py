"""Selection by the gradient of a transport distance to the target."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Scorer
from ftrun.select.geometry.embed import embed_pieces
from ftrun.select.geometry.nearest import nearest_query, similarities, split_scored
from ftrun.select.geometry.transport import sinkhorn
from ftrun.select.queries import load_queries
from ftrun.training.scoring import Similarity

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context


@register("select", "got_d")
@dataclass
class GotD(Scorer):
    """Rows that bring a pool nearer to the target when they get more weight (Kang et al., 2024, arXiv:2405.02774).

    Entropic optimal transport moves the queries to the candidates at the cost |e_q - e_z|^2 of their embeddings; g_z,
    the dual potential of candidate z, is how fast that distance grows with the weight of z. The calibrated gradient is
    ``g_z - mean of all other g``; the smallest are taken, so the score is its negative.
    The smoothing favours rows near many queries: a copy of one query need not come first.
    """

    epsilon: float = 0.1  # entropic smoothing, in units of the squared distance
    momentum: float = 1.3  # overshoot of each update; 1: none
    threshold: float = 0.1  # error of the queries' masses, summed, at which the transport counts as settled
    iterations: int = 2000  # at most
    embedding: Literal["minilm", "model"] = "minilm"  # all-MiniLM-L6-v2, or the mean hidden state of the scoring model
    piece: int = 1000  # characters of a candidate: longer rows are cut, and score the mean of their pieces

    column: ClassVar[str] = "got_d"
    gives_similarity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and 0 < self.momentum < 2 and self.piece > 0 and self.iterations > 0):
            raise ConfigError(
                "epsilon, piece and iterations are above 0, momentum lies between 0 and 2",
                f"select.epsilon={self.epsilon} select.piece={self.piece} select.iterations={self.iterations} "
                f"select.momentum={self.momentum}",
            )

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Negative calibrated gradient of every row, (rows,); NaN for a row without text."""
        queries = load_queries(ctx.settings)
        pieces, owner = embed_pieces(chain(pool, queries), ctx, self.embedding, self.piece)
        means = row_means(pieces, owner, len(pool) + len(queries))
        rows, wanted, known = split_scored(means, pool, queries, "no text", ctx)
        ctx.scorer.embeddings = rows
        ctx.scorer.similarity = similarities(wanted, rows, queries.task, ctx)
        mine = owner < len(pool)
        gradients = calibrated(self.potentials(pieces[~mine], pieces[mine], ctx))
        count = np.bincount(owner[mine], minlength=len(pool))
        total = np.bincount(owner[mine], weights=gradients, minlength=len(pool))
        return {
            "got_d": np.divide(-total, count, out=np.full(len(pool), np.nan), where=count > 0),
            "similarity": nearest_query(ctx.scorer.similarity, known),
        }

    def potentials(self, target: np.ndarray, candidates: np.ndarray, ctx: Context) -> np.ndarray:
        """g of every candidate, up to a constant, (candidates,); both are unit vectors, one a row."""
        compared: Similarity = similarities(target, candidates, np.zeros(len(target), np.int64), ctx)
        plan = sinkhorn(
            compared.matrix,
            np.arange(len(candidates)),
            slope=2.0,  # |a - b|^2 = 2 (1 - a . b)
            epsilon=self.epsilon,
            ctx=ctx,
            momentum=self.momentum,
            threshold=self.threshold,
            iterations=self.iterations,
        )
        return self.epsilon * plan.rows


def calibrated(potentials: np.ndarray) -> np.ndarray:
    """Each potential less the mean of all others; the ranking stays, the unknown constant goes."""
    others = (potentials.sum() - potentials) / max(len(potentials) - 1, 1)
    return potentials - others


def row_means(pieces: np.ndarray, owner: np.ndarray, rows: int) -> np.ndarray:
    """Unit vectors of the rows, the mean of their pieces, (rows, width) float32; zeros where there is none."""
    sums = np.zeros((rows, pieces.shape[1]), np.float32)
    np.add.at(sums, owner, pieces)
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
