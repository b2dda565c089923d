"""One ranking of all trained tokens of an optimiser step, for policies that keep the highest."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ftrun.tokens.q_tuning import target_positions, token_keys
from ftrun.training.view import StepView


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
