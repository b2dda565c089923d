"""How long texts are in tokens, counted in pieces with the tokenizer's own threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from ftrun.data.records import Record

TEXTS = 4096  # tokenised at a time


def count_tokens(tokenizer: Any, texts: Iterable[str]) -> np.ndarray:
    """Tokens of each text, without special tokens, (texts,) int64; the texts are read a piece at a time."""
    parts: list[np.ndarray] = []
    waiting: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(1) as worker:  # the tokenizer works while the next texts are read
        for piece in _pieces(texts):
            waiting.append(worker.submit(_counted, tokenizer, piece))
            if len(waiting) > 1:
                parts.append(waiting.popleft().result())
        parts += [count.result() for count in waiting]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def count_row_tokens(tokenizer: Any, records: Iterable[Record]) -> np.ndarray:
    """Tokens of all texts of each row, template not counted, (rows,) int64."""
    texts_of: list[int] = []

    def texts() -> Iterator[str]:
        for record in records:
            said = record.texts
            texts_of.append(len(said))
            yield from said

    counts = count_tokens(tokenizer, texts())
    ends = np.cumsum(texts_of)
    total = np.concatenate([[0], np.cumsum(counts)])
    return total[ends] - total[ends - np.array(texts_of, np.int64)] if texts_of else np.zeros(0, np.int64)


def _pieces(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while piece := list(islice(rest, TEXTS)):
        yield piece


def _counted(tokenizer: Any, texts: list[str]) -> np.ndarray:
    if getattr(tokenizer, "is_fast", False):
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # what an earlier call has left behind
        backend.no_padding()
        found = backend.encode_batch_fast(texts, add_special_tokens=False)
    else:
        found = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return np.fromiter(map(len, found), np.int64, len(texts))
