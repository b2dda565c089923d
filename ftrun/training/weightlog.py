"""How a token policy that works inside the step has weighed its tokens, step by step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ftrun.data.batches import Batch
from ftrun.data.token_classes import CLASSES, classes_of

FILE = "token_weights.jsonl"
PARTS = 10  # of a response, from its beginning to its end
EXAMPLES = 5  # heaviest and lightest tokens of a step that are kept with their neighbours
CONTEXT = 12  # tokens on either side of such a token
EDGES = np.array(
    [-np.inf, 0.0, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0, 5.0, np.inf]
)


class Example(NamedTuple):
    """A token in its context."""

    factor: float
    row: int  # id
    before: str
    token: str
    after: str


class WeightLog:
    """Counts of one step, added up over micro-batches and processes, then written as a line of token_weights.jsonl.

    The line: step; tokens, kept (factor other than 0) and mean of the factors of all trained tokens; the same three for
    every class of tokens and for every tenth of the responses; histogram of the factors over ``edges``; the heaviest and
    the lightest tokens in context, no token of the vocabulary twice.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, record: np.ndarray):
        """``record``: id of the row of every sequence of the table that trains, (sequences,)."""
        self.tokenizer, self.special, self.record = tokenizer, set(tokenizer.all_special_ids), record
        self.known = np.full(vocabulary, -1, np.int64)  # index into CLASSES of token ids, those seen so far
        self.clear()

    def clear(self) -> None:
        shape = (3, len(CLASSES) + PARTS)  # tokens, kept, sum of factors
        self.sums, self.histogram = np.zeros(shape), np.zeros(len(EDGES) - 1)
        self.heaviest: list[Example] = []
        self.lightest: list[Example] = []

    def add(self, batch: Batch, factors: np.ndarray) -> None:
        """``factors`` of the trained tokens of a micro-batch, (tokens,)."""
        kinds = self._kinds(batch.target_ids.cpu().numpy())
        parts = len(CLASSES) + (PARTS * shares(batch.target_sequence.cpu().numpy())).astype(np.int64)
        values = np.stack([np.ones_like(factors), factors != 0, factors]).astype(np.float64)
        for groups in (kinds, parts):
            for row, numbers in enumerate(values):
                self.sums[row] += np.bincount(groups, numbers, minlength=self.sums.shape[1])
        self.histogram += np.histogram(factors, EDGES)[0]
        self.heaviest = _best(self.heaviest + self._examples(batch, factors, np.argsort(-factors, kind="stable")))
        self.lightest = _best(self.lightest + self._examples(batch, factors, np.argsort(factors, kind="stable")), False)

    def _examples(self, batch: Batch, factors: np.ndarray, order: np.ndarray) -> list[Example]:
        """The first tokens of ``order`` with what stands around them in the input that the model saw."""
        targets, found = batch.targets, dict[int, Example]()
        # brought over whole: single numbers read off a GPU would each wait for it
        flat = [part.cpu().numpy() for part in (targets.ids, targets.row, targets.sequence, targets.position)]
        inputs, sequences, index = (p.cpu().numpy() for p in (batch.input_ids, batch.sequence, batch.table_index))
        for at in order[: 40 * EXAMPLES].tolist():
            token, row, sequence, before = (int(part[at]) for part in flat)
            if token in found:
                continue
            here = sequences[row] == sequence
            position = before + 1  # the state before a token predicts it
            parts = [slice(max(0, position - CONTEXT), position)]
            if batch.own_targets is None:  # else what is predicted need not come next
                parts.append(slice(position + 1, position + 1 + CONTEXT))
            around = [self.tokenizer.decode(inputs[row, part][here[part]].tolist()) for part in parts]
            record = int(self.record[index[sequence]])
            found[token] = Example(
                float(factors[at]), record, around[0], self.tokenizer.decode([token]), "".join(around[1:])
            )
            if len(found) == EXAMPLES:
                break
        return list(found.values())

    @property
    def gathered(self) -> tuple[np.ndarray, np.ndarray, list[Example], list[Example]]:
        """What one process knows of the step."""
        return self.sums, self.histogram, self.heaviest, self.lightest

    def _kinds(self, ids: np.ndarray) -> np.ndarray:
        new = np.unique(ids[self.known[ids] < 0])
        if len(new):
            self.known[new] = classes_of(new, lambda number: self.tokenizer.decode([number]), self.special)
        return self.known[ids]

    def line(self, step: int, gathered: list[Any]) -> dict[str, Any]:
        """The line of a step from what all processes ``gathered``."""
        sums, histogram = (np.sum([one[i] for one in gathered], axis=0) for i in (0, 1))
        heaviest, lightest = ([example for one in gathered for example in one[i]] for i in (2, 3))
        kinds, parts = sums[:, : len(CLASSES)], sums[:, len(CLASSES) :]
        return {
            "step": step,
            **_facts(kinds.sum(axis=1)),
            "classes": {name: _facts(kinds[:, i]) for i, name in enumerate(CLASSES) if kinds[0, i]},
            "parts": [_facts(parts[:, i]) for i in range(PARTS)],
            "edges": EDGES[:-1].tolist(),
            "histogram": histogram.astype(int).tolist(),
            "heaviest": [example._asdict() for example in _best(heaviest)],
            "lightest": [example._asdict() for example in _best(lightest, highest=False)],
        }


def _best(examples: list[Example], highest: bool = True) -> list[Example]:
    """The first EXAMPLES by factor, every token once; of equal ones those of the earliest rows."""
    found: dict[str, Example] = {}
    for one in sorted(examples, key=lambda one: (-one.factor if highest else one.factor, one.row, one.before)):
        found.setdefault(one.token, one)
    return list(found.values())[:EXAMPLES]


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
