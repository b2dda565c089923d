"""What the rows of a pool are about, cheaply: hashed bags of words, clusters of them, and where rows come from."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix

from ftrun.select.row_numbers import row_numbers

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.data.records import Record

BUCKETS = 1 << 16  # that words are hashed into
WIDTH = 32  # directions that bags are seen in
READ = 2000  # characters of a row that count
CLUSTERS = 20  # as many as a person reads
SMALL = 2  # a pool of SMALL x k^2 rows gets k clusters, when that is less
FITTED = 20_000  # rows whose words are read, and that shape the clusters
ITERATIONS = 25
CHUNK = 16_384  # rows at a time
NAMING = 4000  # rows that name the clusters
NAMES = 3  # words a cluster
BAG, EMBEDDING = "hashed bag of words", "embeddings of the scorer"
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")  # scripts without blanks: every character is a word


@dataclass
class Bags:
    """Hashed words of rows: tf-idf weights, scaled to length 1 a row. One entry a row and word."""

    rows: int
    owner: np.ndarray  # (entries,) row, rising
    bucket: np.ndarray  # (entries,)
    weight: np.ndarray  # (entries,)

    def nearness(self, row: int) -> np.ndarray:
        """Cosine of every row's words with those of one row, (rows,)."""
        asked = np.zeros(BUCKETS)
        mine = self.owner == row
        asked[self.bucket[mine]] = self.weight[mine]
        return np.bincount(self.owner, weights=asked[self.bucket] * self.weight, minlength=self.rows)

    @property
    def matrix(self) -> csr_matrix:
        """The same as a sparse matrix, (rows, BUCKETS)."""
        return csr_matrix((self.weight, (self.owner, self.bucket)), shape=(self.rows, BUCKETS))


@dataclass
class Vocabulary:
    """How rare hashed words are: ``rarity``, (BUCKETS,), is log((1 + texts) / (1 + texts with it))."""

    rarity: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> Vocabulary:
        _, bucket, _ = _count(texts)
        return cls(np.log((1 + len(texts)) / (1 + np.bincount(bucket, minlength=BUCKETS))))

    def bags(self, texts: Sequence[str]) -> Bags:
        """Bags of these texts; a word weighs (1 + log of its count) x its rarity."""
        owner, bucket, count = _count(texts)
        weight = (1 + np.log(count)) * self.rarity[bucket]
        length = np.sqrt(np.bincount(owner, weights=weight**2, minlength=len(texts)))
        return Bags(len(texts), owner, bucket, weight / np.maximum(length[owner], 1e-12))


def _count(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text, bucket and number of times of every distinct word of every text, each (entries,)."""
    found = [_bag(text) for text in texts]
    owner = np.repeat(np.arange(len(found)), [len(bag) for bag in found])
    bucket = np.fromiter((bucket for bag in found for bucket in bag), np.int64, len(owner))
    return owner, bucket, np.fromiter((count for bag in found for count in bag.values()), np.float64, len(owner))


def _bag(text: str) -> dict[int, int]:
    """How often each bucket is hit."""
    bag: dict[int, int] = {}
    for word, count in Counter(words(text)).items():
        bucket = _bucket(word)
        bag[bucket] = bag.get(bucket, 0) + count
    return bag


@lru_cache(1 << 17)
def _bucket(word: str) -> int:
    """All numbers are one word."""
    return zlib.crc32(b"#" if word.isdigit() else word.encode()) % BUCKETS


def words(text: str) -> list[str]:
    """Lower-case words of the beginning of a text."""
    return WORD.findall(text[:READ].lower())


def text_of(record: Record) -> str:
    """All texts of a row, one below the other."""
    return "\n".join(record.texts)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; zeros stay."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@dataclass
class Clusters:
    """``label``: (rows,) cluster of every row, the largest cluster being 0, -1 for a row that was not looked at.

    ``names``: the most telling words of each cluster.
    """

    by: str  # what was clustered
    label: np.ndarray
    names: list[str]

    @property
    def rows(self) -> int:
        """Rows that were looked at."""
        return int((self.label >= 0).sum())


@dataclass
class Content:
    """The pool as the audit sees it; everything is made when it is asked for, once."""

    pool: Pool
    seed: int

    @cached_property
    def chance(self) -> np.ndarray:
        """A number in [0, 1) for every row by which the random choice is drawn, (rows,)."""
        return row_numbers(self.pool, self.seed, "audit")

    @cached_property
    def by_words(self) -> Clusters:
        """Clusters of the bags in the directions in which they differ most (latent semantic analysis).

        Of a large pool the words of a sample are read, which follows from the content of the rows alone.
        """
        from sklearn.utils.extmath import randomized_svd

        places = self.sampled[:FITTED]
        texts = self._texts(places)
        sample = Vocabulary.of(texts).bags(texts).matrix
        directions = randomized_svd(sample, min(WIDTH, len(texts)), random_state=self.seed)[2].T
        return self._clusters(BAG, unit(sample @ directions), places)

    @cached_property
    def sampled(self) -> np.ndarray:
        """All places in an order that follows from the content of the rows alone, (rows,)."""
        return np.argsort(self.chance, kind="stable")

    def _texts(self, places: np.ndarray) -> list[str]:
        return [text_of(self.pool[int(id)]) for id in self.pool.ids[places]]

    def clusters(self, embeddings: np.ndarray | None) -> Clusters:
        """Clusters of the embeddings, where there are some, else of bags of words."""
        if embeddings is None:
            return self.by_words
        return self._clusters(EMBEDDING, unit(embeddings), np.arange(len(embeddings)))

    def _clusters(self, by: str, vectors: np.ndarray, places: np.ndarray) -> Clusters:
        """Clusters of the rows at ``places``, whose ``vectors`` these are."""
        wanted = max(1, min(CLUSTERS, round((len(vectors) / SMALL) ** 0.5)))
        order = np.argsort(self.chance[places], kind="stable")[:FITTED]
        label = np.full(len(self.pool), -1)
        label[places] = kmeans(vectors, wanted, order, self.seed)
        return Clusters(by, label, self._names(label))

    def _names(self, label: np.ndarray) -> list[str]:
        """The words that are common in a cluster and rare elsewhere, a line each."""
        looked_at = self.sampled[label[self.sampled] >= 0][:NAMING]
        inside: dict[int, Counter[str]] = {}
        overall: Counter[str] = Counter()
        for place, text in zip(looked_at.tolist(), self._texts(looked_at), strict=True):
            found = {word for word in words(text) if len(word) > 2 and not word.isdigit()}
            inside.setdefault(int(label[place]), Counter()).update(found)
            overall.update(found)
        sizes = np.bincount(label[looked_at], minlength=int(label.max(initial=-1)) + 1)
        names = []
        for number, size in enumerate(sizes.tolist()):
            telling = {
                word: count / size * np.log(count / size * len(looked_at) / overall[word])
                for word, count in inside.get(number, Counter()).items()
                if count > 1 or size < 4
            }
            best = sorted(telling, key=lambda word, telling=telling: (-telling[word], word))[:NAMES]
            names.append(" · ".join(best) or "(no words)")
        return names


def kmeans(vectors: np.ndarray, wanted: int, fitted: np.ndarray, seed: int) -> np.ndarray:
    """Cluster of every row by k-means, (rows,), the largest cluster first; ``fitted``: the rows that shape the centres."""
    from sklearn.cluster import KMeans

    wanted = min(wanted, len(np.unique(vectors[fitted].round(5), axis=0)))
    model = KMeans(wanted, n_init="auto", max_iter=ITERATIONS, random_state=seed).fit(vectors[fitted])
    label = np.concatenate([model.predict(vectors[at : at + CHUNK]) for at in range(0, len(vectors), CHUNK)])
    place = np.empty(wanted, np.int64)
    place[np.argsort(-np.bincount(label, minlength=wanted), kind="stable")] = np.arange(wanted)
    return place[label]
