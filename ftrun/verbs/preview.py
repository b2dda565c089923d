"""``ftrun preview``: rows exactly as they are trained."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftrun.config.compose import Composed
from ftrun.config.settings import Settings
from ftrun.data.batches import best_fit_decreasing, token_budget
from ftrun.data.pool import Pool
from ftrun.data.tokens import TokenTable
from ftrun.errors import ConfigError
from ftrun.models.load import load_tokenizer
from ftrun.reporting.preview import PreviewRow, preview_html, preview_terminal
from ftrun.stages.chain import Chain
from ftrun.stages.trained import plain_context
from ftrun.training.signals import StopSignals

ROWS = 8


def preview(composed: Composed, html: bool) -> dict[str, Any]:
    """Print the first rows of training with their loss weights, or write them as a page (--html).

    A method that weighs tokens before training weighs them all; one that weighs them inside the step shows the rows of
    the first step, as the untrained model would weigh them.
    """
    settings = composed.settings
    if settings.out and not html:
        raise ConfigError("out is the folder of the page, and none was asked for", f"out={settings.out}", "Add --html.")
    with tempfile.TemporaryDirectory(prefix="ftrun-preview-") as scratch:
        chain = Chain(plain_context(settings, Path(scratch)), composed, [], StopSignals())
        train_pool = chain.rows.training(evaluates=False)
        chain.check_budget(train_pool)
        train_pool = chain.rows.edit(train_pool, chain.load_model)
        prepared = chain.rows.tokenise(train_pool)
        table, weights = _weighed(chain, train_pool, prepared.table)
        notes = ["weights are those of the first step, under the model before training"] if weights else []
        if chain.tokens.arranges:
            notes.append("the method changes the inputs of these rows in every step: they are shown as they are before")
        rows = _rows(settings, table, weights)
    trained = int(table.trained_counts().sum())
    counts = {
        "rows": len(prepared.kept),
        "tokens": int(table.offsets[-1] - table.continues.sum()),
        "trained_tokens": trained,
        "note": "; ".join(notes),
        "dropped": {reason: len(ids) for reason, ids in prepared.dropped.items()},
    }
    title = f"{settings.recipe or 'data'}: {settings.data.path}"
    if html:
        path = Path(settings.out or ".") / "preview.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        preview_html(rows, counts, title, path)
        print(path)
        return {"page": str(path), **counts}
    preview_terminal(rows, counts, title)
    return counts


def _weighed(chain: Chain, pool: Pool, table: TokenTable) -> tuple[TokenTable, dict[int, np.ndarray]]:
    """The table with static weights, and weights of every token by sequence where the first step decides them."""
    tokens, ctx = chain.tokens, chain.ctx
    if not (tokens.static or tokens.remembers or tokens.dynamic or chain.settings.tokens.from_run):
        return table, {}
    chain.load_model()
    table = chain.rows.weigh(table, pool)
    ctx.train_tokens = table
    if not tokens.dynamic:
        return table, {}
    found = {}
    for index, weights in chain.attach(table).weights_at_start().items():
        sequence = table.sequence(index)
        at = np.flatnonzero(sequence.loss_weight > 0)
        at = at[at > 0]
        if len(at) == len(weights):  # a policy that inserts tokens counts others
            found[index] = np.zeros(len(sequence.input_ids), np.float32)
            found[index][at] = weights.float().cpu().numpy()
    return table, found


def _rows(settings: Settings, table: TokenTable, weights: dict[int, np.ndarray]) -> list[PreviewRow]:
    """The first rows, or the first of those that ``weights`` tells of."""
    tokenizer = load_tokenizer(settings.model)
    budget = token_budget(settings.train.batch_tokens, torch.device("cpu"))
    packs = _neighbours(np.asarray(table.lengths), budget) if settings.train.packing else {}
    continues = table.continues
    shown = sorted(weights) or range(len(table.record))
    rows = []
    for index in shown[: ROWS * table.sequences_per_row]:
        sequence = table.sequence(index)
        own = weights.get(index, sequence.loss_weight).copy()
        own[:1] = 0  # nothing predicts the first token
        piece = 1 + int(np.argmin(continues[index::-1]))
        notes = [f"piece {piece} of its text"] if piece > 1 or continues[index + 1 : index + 2].any() else []
        if packs.get(index):
            notes.append(f"packed with rows {', '.join(map(str, dict.fromkeys(table.record[packs[index]].tolist())))}")
        tokens = [tokenizer.decode([token]) for token in sequence.input_ids.tolist()]
        rows.append(PreviewRow(sequence.record, tokens, own.tolist(), " · ".join(notes)))
    return rows


def _neighbours(lengths: np.ndarray, capacity: int) -> dict[int, list[int]]:
    """For every sequence the others that it would share a packed row with, if all rows were one step."""
    groups = best_fit_decreasing(lengths, max(capacity, int(lengths.max(initial=1))))
    return {index: [other for other in group if other != index] for group in groups for index in group}
