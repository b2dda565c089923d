"""``ftrun preview``: rows exactly as they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ftrun.chain import Chain
from ftrun.config.compose import Composed
from ftrun.data.batches import best_fit_decreasing, token_budget
from ftrun.data.pool import load_pool
from ftrun.models.load import load_tokenizer
from ftrun.reporting.preview import PreviewRow, preview_html, preview_terminal
from ftrun.training.signals import StopSignals
from ftrun.verbs.trained import plain_context

ROWS = 8


def preview(composed: Composed, html: bool) -> dict[str, Any]:
    """Print the first rows of training with their loss weights, or write them as a page (--html)."""
    settings = composed.settings
    ctx = plain_context(settings, Path(settings.out or "."))
    chain = Chain(ctx, composed, [], StopSignals())
    pool = load_pool(settings.data, chain.work, settings.seed)
    prepared = chain.prepare(pool, "rows")
    table = prepared.table
    tokenizer = load_tokenizer(settings.model)
    packs = (
        _neighbours(np.asarray(table.lengths), token_budget(settings.train.batch_tokens, ctx.team.device))
        if settings.train.packing
        else {}
    )
    rows, piece = [], 0
    continues = table.continues
    for index in range(min(ROWS * table.sequences_per_row, len(table.record))):
        sequence = table.sequence(index)
        weights = sequence.loss_weight.copy()
        weights[:1] = 0  # nothing predicts the first token
        piece = piece + 1 if continues[index] else 1
        notes = [f"piece {piece} of its text"] if piece > 1 or continues[index + 1 : index + 2].any() else []
        if packs.get(index):
            notes.append(f"packed with rows {', '.join(map(str, dict.fromkeys(table.record[packs[index]].tolist())))}")
        tokens = [tokenizer.decode([token]) for token in sequence.input_ids.tolist()]
        rows.append(PreviewRow(sequence.record, tokens, weights.tolist(), " · ".join(notes)))
    trained = int(table.trained_counts().sum())
    counts = {
        "rows": len(prepared.kept),
        "tokens": int(table.offsets[-1] - continues.sum()),
        "trained_tokens": trained,
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


def _neighbours(lengths: np.ndarray, capacity: int) -> dict[int, list[int]]:
    """For every sequence the others that it would share a packed row with, if all rows were one step."""
    groups = best_fit_decreasing(lengths, max(capacity, int(lengths.max(initial=1))))
    return {index: [other for other in group if other != index] for group in groups for index in group}
