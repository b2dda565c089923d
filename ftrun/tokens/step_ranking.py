"""Rankings of trained tokens, within a group or over a whole optimiser step, for policies that keep some of them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ftrun.data.batches import Batch
from ftrun.training.view import StepView

POSITION_BITS = 32  # of a token's key: place of its sample above, position below


def ranked(view: StepView, scores: Tensor) -> Tensor:
    """What `TokenPolicy.statistic` gives for `keep_highest`: place in the data, position and score of every token.

    Flattened, float64.
    """
    batch = view.batch
    place = batch.table_index[batch.target_sequence].double()
    return torch.stack([place, target_positions(batch).double(), scores.detach().double()], dim=1).flatten()


def keep_highest(view: StepView, share: float) -> Tensor:
    """Factors of the tokens of one micro-batch, (tokens,), that make the loss the mean over the tokens kept in the step.

    Of the step's N tokens the ``kept_count(share, N)`` highest are kept, equal scores in the order of the data, the
    others get 0. Two copies of a row, where epochs meet, share their fate.
    """
    assert view.step_statistics is not None
    place, position, score = view.step_statistics.cpu().numpy().reshape(-1, 3).T
    every_key = token_keys(place, position)
    order = np.lexsort((every_key, -score))
    keys = every_key[order[: kept_count(share, len(order))]]
    kept = int(np.isin(every_key, keys).sum())
    batch = view.batch
    mine = token_keys(batch.table_index[batch.target_sequence].cpu().numpy(), target_positions(batch).cpu().numpy())
    return torch.from_numpy(np.isin(mine, keys) * (len(order) / max(1, kept))).to(view.token_nll)


def kept_count(share: float, count: int) -> int:
    """``share`` of ``count`` rounded up: of anything at least one is kept."""
    return math.ceil(share * count - 1e-9)  # 0.55 * 100 is 55.00000000000001


def ranks(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Rank of every value in its group from 0, the lowest first, ties by position, (values,)."""
    order = np.lexsort((values, group))
    ordered = group[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    found = np.empty(len(values), np.int64)
    found[order] = np.arange(len(values)) - np.repeat(starts, np.diff(starts, append=len(values)))
    return found


def token_keys(place: np.ndarray, position: np.ndarray) -> np.ndarray:
    """One number a token: the place of its sample in the data, and its position there."""
    return (place.astype(np.int64) << POSITION_BITS) | position.astype(np.int64)


def target_positions(batch: Batch) -> Tensor:
    """Position in its sequence of every trained token, (tokens,)."""
    row, before = batch.predicting
    return batch.position_ids[row, before + 1]


def descending(scores: np.ndarray) -> np.ndarray:
    """Places of the scores that are numbers, the highest first, ties to the earlier."""
    scored = np.flatnonzero(~np.isnan(scores))
    return scored[np.argsort(-scores[scored], kind="stable")]
