"""How a token policy that works inside the step has weighed its tokens, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np

from ftrun.data.batches import Batch
from ftrun.tokens.classes import CLASSES, classes_of

FILE = "token_weights.jsonl"
PARTS = 10  # of a response, from its beginning to its end
EDGES = np.array([0.0, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0, 5.0, np.inf])


class WeightLog:
    """Counts of one step, added up over micro-batches and processes, then written as a line of token_weights.jsonl.

    The line: step; tokens, kept (factor above 0) and mean of the factors of all trained tokens; the same three for every
    class of tokens and for every tenth of the responses; histogram of the factors over ``edges``.
    """

    def __init__(self, tokenizer: Any, vocabulary: int):
        self.tokenizer, self.special = tokenizer, set(tokenizer.all_special_ids)
        self.known = np.full(vocabulary, -1, np.int64)  # index into CLASSES of token ids, those seen so far
        self.clear()

    def clear(self) -> None:
        shape = (3, len(CLASSES) + PARTS)  # tokens, kept, sum of factors
        self.sums, self.histogram = np.zeros(shape), np.zeros(len(EDGES) - 1)

    def add(self, batch: Batch, factors: np.ndarray) -> None:
        """``factors`` of the trained tokens of a micro-batch, (tokens,)."""
        kinds = self._kinds(batch.target_ids.cpu().numpy())
        parts = len(CLASSES) + (PARTS * shares(batch.target_sequence.cpu().numpy())).astype(np.int64)
        values = np.stack([np.ones_like(factors), factors > 0, factors]).astype(np.float64)
        for groups in (kinds, parts):
            for row, numbers in enumerate(values):
                self.sums[row] += np.bincount(groups, numbers, minlength=self.sums.shape[1])
        self.histogram += np.histogram(factors, EDGES)[0]

    def _kinds(self, ids: np.ndarray) -> np.ndarray:
        new = np.unique(ids[self.known[ids] < 0])
        if len(new):
            self.known[new] = classes_of(new, lambda number: self.tokenizer.decode([number]), self.special)
        return self.known[ids]

    def line(self, step: int, gathered: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
        """The line of a step from (sums, histogram) of all processes."""
        sums, histogram = (np.sum([one[i] for one in gathered], axis=0) for i in (0, 1))
        kinds, parts = sums[:, : len(CLASSES)], sums[:, len(CLASSES) :]
        return {
            "step": step,
            **_facts(kinds.sum(axis=1)),
            "classes": {name: _facts(kinds[:, i]) for i, name in enumerate(CLASSES) if kinds[0, i]},
            "parts": [_facts(parts[:, i]) for i in range(PARTS)],
            "edges": EDGES[:-1].tolist(),
            "histogram": histogram.astype(int).tolist(),
        }


def shares(sequence: np.ndarray) -> np.ndarray:
    """Place of every trained token among those of its sequence, from 0 to below 1, (tokens,); they stand in order."""
    order = np.argsort(sequence, kind="stable")
    counts = np.bincount(sequence)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    found = np.empty(len(sequence))
    found[order] = (np.arange(len(sequence)) - starts) / np.repeat(counts, counts)
    return found


def _facts(values: np.ndarray) -> dict[str, float | None]:
    tokens, kept, total = values.tolist()
    return {"tokens": int(tokens), "kept": int(kept), "mean": total / tokens if tokens else None}
