"""A few rows of every kind, of middling difficulty, to train a scoring model on before it scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ftrun.select.base import Table
from ftrun.select.geometry.cluster import by_content, cluster_rows
from ftrun.select.geometry.embed import embed_rows
from ftrun.training.scoring import segments

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.select.scoring.texts import Turns
    from ftrun.training.context import Context

ITERATIONS, RESTARTS = 300, 10  # of k-means


def warmup_rows(
    turns: Turns, pool: Pool, candidates: np.ndarray, count: int, clusters: int, percentiles: list[float], ctx: Context
) -> np.ndarray:
    """Places of at most ``count`` of the ``candidates``, sorted: an equal number from each cluster of prompts.

    Of a cluster only the rows count whose prompt has a perplexity within its ``percentiles``. One with fewer rows than
    its number gives all of them.
    """
    vectors = embed_rows(pool, ctx, "model", "prompt")
    table = Table({}, np.ones(len(pool)), pool, vectors)
    rows = by_content(table, candidates, ctx, "warmup")
    label = ctx.team.gather_object(cluster_rows(table, rows, clusters, ITERATIONS, RESTARTS, ctx).label)[0]
    loss = prompt_losses(turns, rows, ctx)
    kept = [
        rows[label == number][strided(loss[label == number], count // clusters, percentiles)]
        for number in range(int(label.max()) + 1)
    ]
    return np.sort(np.concatenate(kept))


def prompt_losses(turns: Turns, rows: np.ndarray, ctx: Context) -> np.ndarray:
    """Mean nll of the first prompt of each of these rows, (rows,); it orders rows as their perplexity does."""
    owners, first = np.unique(turns.row, return_index=True)
    prompts = segments(([], turns.prompt[turn]) for turn in first[np.searchsorted(owners, rows)].tolist())
    return ctx.scorer.mean_nll(prompts, "score prompts")


def strided(loss: np.ndarray, count: int, percentiles: list[float]) -> np.ndarray:
    """Positions of at most ``count`` losses within their percentiles, evenly spread; all where they are fewer."""
    if len(loss) < count or np.isnan(loss).all():
        return np.arange(len(loss))[:count]
    low, high = np.nanpercentile(loss, percentiles)
    within = np.flatnonzero((loss >= low) & (loss <= high))
    return within if len(within) <= count else within[np.arange(count) * len(within) // count]
