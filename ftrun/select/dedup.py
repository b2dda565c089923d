"""Near-duplicates: rows that say what another row says."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Literal

import numpy as np

from ftrun.errors import ConfigError
from ftrun.select.content import WORD, text_of
from ftrun.select.geometry.embed import embed_rows
from ftrun.select.geometry.greedy import seconds_for, spoken

if TYPE_CHECKING:
    from collections.abc import Callable

    from ftrun.data.pool import Pool
    from ftrun.select.base import Table
    from ftrun.training.context import Context

Method = Literal["minhash", "embedding"]

THRESHOLD: dict[Method, float] = {"minhash": 0.8, "embedding": 0.95}  # Jaccard similarity; cosine
SHINGLE = 3  # words
BANDS, ROWS_A_BAND = 32, 4  # pairs of similarity 0.8 meet in some band with probability 1 - 1e-7, of 0.5 with 0.87
SIGNATURE = BANDS * ROWS_A_BAND
ENTRIES = 50_000  # shingles hashed at a time
SLACK = 0.15  # the signature may be this far below the true similarity: 4 standard deviations at 0.8
BLOCK = 2048  # rows compared at a time
SLOW = 60  # seconds from which comparing all with all is announced


def duplicates(table: Table, rows: np.ndarray, method: Method, threshold: float | None, ctx: Context) -> np.ndarray:
    """For every row of the pool the place of the row it repeats, or -1, (pool,). Only ``rows`` (places) are compared.

    Rows come in the order of their content hash; one falls if a row kept before it is at least as similar as
    ``threshold``, and the most similar of those stands for it. Rows without text never fall.
    """
    threshold = THRESHOLD[method] if threshold is None else threshold
    if not 0 < threshold <= 1:
        raise ConfigError("a similarity lies between 0 and 1", f"select.dedup_threshold={threshold}")
    pool = table.pool
    assert pool is not None
    found = np.full(len(table), -1, np.int64)
    order = rows[np.argsort(pool.hashes[rows], kind="stable")]
    if method == "minhash":
        same = by_words(texts_of(pool, order), threshold)
    else:
        vectors = table.embeddings if table.embeddings is not None else embed_rows(pool, ctx)
        same = by_vectors(np.asarray(vectors[order], np.float32), threshold, ctx.report.note)
    fell = np.flatnonzero(same >= 0)
    found[order[fell]] = order[same[fell]]
    return found


def texts_of(pool: Pool, places: np.ndarray) -> list[str]:
    return [text_of(pool[int(id)]) for id in pool.ids[places]]


def by_words(texts: list[str], threshold: float) -> np.ndarray:
    """For every text the position of the kept one before it that shares most word triples, or -1, (texts,).

    Candidates share a band of their MinHash signatures; the Jaccard similarity itself decides.
    """
    sets = [shingles(text) for text in texts]
    signature = signatures(sets)
    bands = signature.reshape(len(sets), BANDS, ROWS_A_BAND)
    found = np.full(len(sets), -1, np.int64)
    buckets: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]
    for position, own in enumerate(sets):
        if not len(own):
            continue
        keys = [band.tobytes() for band in bands[position]]
        near = sorted({other for key, bucket in zip(keys, buckets, strict=True) for other in bucket.get(key, ())})
        found[position] = _most_similar(own, position, np.array(near, np.int64), sets, signature, threshold)
        if found[position] < 0:  # only kept rows stand for others
            for key, bucket in zip(keys, buckets, strict=True):
                bucket.setdefault(key, []).append(position)
    return found


def _most_similar(
    own: np.ndarray,
    position: int,
    near: np.ndarray,
    sets: list[np.ndarray],
    signature: np.ndarray,
    threshold: float,
) -> int:
    if not len(near):
        return -1
    likely = near[(signature[near] == signature[position]).mean(1) >= threshold - SLACK]
    best, highest = -1, 0.0
    for other in likely.tolist():
        similarity = jaccard(own, sets[other])
        if similarity >= threshold and similarity > highest:
            best, highest = other, similarity
    return best


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Shared over all elements of two sets, each given as distinct values."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def shingles(text: str) -> np.ndarray:
    """Distinct hashes of the word triples of a text, sorted, uint32; a shorter text is one shingle. Case does not count."""
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in WORD.findall(text.lower())), np.uint64)
    if not len(hashes):
        # nothing but signs: equal only to the same signs
        return np.array([zlib.crc32(text.strip().encode())] if text.strip() else [], np.uint32)
    size = min(SHINGLE, len(hashes))
    mixed = np.zeros(len(hashes) - size + 1, np.uint64)
    for at in range(size):
        mixed = (mixed + hashes[at : at + len(mixed)]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def signatures(sets: list[np.ndarray]) -> np.ndarray:
    """MinHash signatures, (sets, SIGNATURE) uint32; equal places of two have the sets' Jaccard similarity as their share."""
    random = np.random.default_rng(0)
    factor = random.integers(0, 2**63, SIGNATURE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shift = random.integers(0, 2**63, SIGNATURE, dtype=np.uint64)
    result = np.zeros((len(sets), SIGNATURE), np.uint32)
    filled = np.array([number for number, own in enumerate(sets) if len(own)], np.int64)
    ends = np.cumsum([len(sets[number]) for number in filled])
    start = 0
    while start < len(filled):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + ENTRIES, side="right")))
        values = np.concatenate([sets[number] for number in filled[start:end]]).astype(np.uint64)
        hashed = ((values[:, None] * factor + shift) >> np.uint64(32)).astype(np.uint32)
        starts = np.concatenate([[0], ends[start : end - 1] - before]).astype(np.int64)
        result[filled[start:end]] = np.minimum.reduceat(hashed, starts, axis=0)
        start = end
    return result


def by_vectors(vectors: np.ndarray, threshold: float, say: Callable[[str], None]) -> np.ndarray:
    """For every unit vector the position of the kept one before it with the highest cosine, or -1, (rows,)."""
    rows = len(vectors)
    seconds = seconds_for(rows**2 / 2, lambda n: vectors[:n] @ vectors[:n].T, rows) if rows > BLOCK else 0
    if seconds > SLOW:
        say(
            f"select.dedup=embedding compares {rows:,} rows all with all, about {spoken(seconds)}; "
            "select.dedup=minhash is linear in the rows"
        )
    found = np.full(rows, -1, np.int64)
    highest = np.full(rows, threshold - 1e-6, np.float32)  # the cosine of a copy may round to less than 1
    for at in range(0, rows, BLOCK):
        part = np.arange(at, min(at + BLOCK, rows))
        for other in range(0, at, BLOCK):
            kept = np.flatnonzero(found[other : other + BLOCK] < 0) + other
            if len(kept):
                _closer(vectors[part] @ vectors[kept].T, part, kept, found, highest)
        cosine = vectors[part] @ vectors[part].T
        for place, row in enumerate(part[1:].tolist(), 1):
            near = np.where(found[part[:place]] < 0, cosine[place, :place], -np.inf)
            if near.max() > highest[row]:
                found[row] = part[int(near.argmax())]
    return found


def _closer(cosine: np.ndarray, part: np.ndarray, kept: np.ndarray, found: np.ndarray, highest: np.ndarray) -> None:
    """Note the nearest kept row where it is nearer than what was found before."""
    nearest = cosine.argmax(1)
    value = cosine[np.arange(len(part)), nearest]
    nearer = value > highest[part]
    found[part[nearer]], highest[part[nearer]] = kept[nearest[nearer]], value[nearer]
