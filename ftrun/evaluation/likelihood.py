"""Log-likelihoods of token sequences under the model, shared by the evaluators that need no generation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ftrun.data.batches import Batch, collate, cut_batches, token_budget
from ftrun.data.tokens import TokenTable
from ftrun.errors import DataError
from ftrun.models.fast import packs_for_free
from ftrun.models.head import LOGITS_BYTES

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@dataclass
class Likelihood:
    """What the model says of each sequence, all (sequences,)."""

    nll: np.ndarray  # sum over the tokens asked for, float64
    tokens: np.ndarray  # how many those are
    correct: np.ndarray  # how many of them are the model's most likely token


def likelihood(bundle: Bundle, table: TokenTable, ctx: Context, batch_tokens: int | None, name: str) -> Likelihood:
    """Sums over the tokens of weight above 0 of every sequence of ``table``, on all processes alike.

    Whole batches are dealt to the processes, so their number changes nothing; the batch size changes rounding only.
    Raises DataError for a sequence longer than the model's context.
    """
    lengths = np.asarray(table.lengths)
    _check_lengths(table, bundle)
    asked = np.flatnonzero(table.trained_counts() > 0)
    result = Likelihood(np.zeros(len(lengths)), np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64))
    packed = packs_for_free(bundle.model, bundle.architecture)
    cut = cut_batches(lengths[asked], token_budget(batch_tokens, bundle.device), packed)
    batches = [[[int(asked[place]) for place in row] for row in batch] for batch in cut]
    mine = ctx.team.share(batches)
    found: list[tuple[np.ndarray, Likelihood]] = []
    with ctx.report.task(name, sum(len(row) for batch in mine for row in batch), unit="sequences") as task:
        for rows in mine:
            batch = collate(table, rows, bundle.pad_id).to(bundle.device)
            found.append((np.concatenate(rows), _of_batch(bundle, batch)))
            task.advance(batch.sequences)
    for part in ctx.team.collect(found):
        for indices, values in part:
            for field in fields(Likelihood):
                getattr(result, field.name)[indices] = getattr(values, field.name)
    return result


def _check_lengths(table: TokenTable, bundle: Bundle) -> None:
    lengths = np.asarray(table.lengths)
    if len(lengths) and lengths.max() > bundle.context_length:
        row = int(table.record[int(lengths.argmax())])
        raise DataError(
            f"row {row} has {lengths.max()} tokens; {bundle.path} attends to {bundle.context_length}",
            "in the rows to evaluate",
            "Lower data.max_length, or shorten the row.",
        )


@torch.no_grad()
def _of_batch(bundle: Bundle, batch: Batch) -> Likelihood:
    hidden = bundle.architecture.hidden_states(bundle.model, batch)[batch.predicting]
    head = bundle.architecture.head(bundle.model)
    rows = max(1, LOGITS_BYTES // (4 * max(1, head.vocabulary)))
    scores = [
        _of_tokens(head.logits(states), targets)
        for states, targets in zip(hidden.split(rows), batch.target_ids.split(rows), strict=True)
    ]
    nll, correct = (torch.cat(values).double().cpu().numpy() for values in zip(*scores, strict=True))
    owner = batch.target_sequence.cpu().numpy()
    return Likelihood(
        np.bincount(owner, weights=nll, minlength=batch.sequences),
        np.bincount(owner, minlength=batch.sequences),
        np.bincount(owner, weights=correct, minlength=batch.sequences).astype(np.int64),
    )


def _of_tokens(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood, and whether the target is the most likely token, (tokens,) each."""
    nll = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return nll, logits.argmax(-1) == targets
