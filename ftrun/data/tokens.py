"""Token sequences of a data set, flat and memory-mapped, with the one column that says what is trained."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

CHUNK = 8192  # sequences looked at at a time
HASHED = 1 << 22  # numbers hashed at a time


@dataclass
class Sequence:
    """One token sequence; ``loss_weight[t]`` is the weight of predicting token t (0: not trained)."""

    input_ids: np.ndarray  # (time,) int32
    loss_weight: np.ndarray  # (time,) float32
    record: int  # id of the row that it comes from
    label: int = -1  # class, for kind "labels"

    @property
    def trained(self) -> int:
        return int((self.loss_weight[1:] > 0).sum())


@dataclass
class TokenTable:
    """All sequences one after the other. A pair is two neighbouring sequences, chosen first.

    A long text is several neighbours of one record, each a row of the table for itself; see `continues`.

    input_ids: (tokens,) int32; loss_weight: (tokens,) float32; offsets: (sequences + 1,) int64;
    record, label: (sequences,) int64. remembered: numbers of every token that a token policy asked for, by name,
    (tokens,) float32 each. role: (tokens,) uint8, index into roles.ROLES, where somebody wants to know; nothing that is
    trained depends on it.
    """

    input_ids: np.ndarray
    loss_weight: np.ndarray
    offsets: np.ndarray
    record: np.ndarray
    label: np.ndarray
    sequences_per_row: int = 1  # 2 for pairs
    remembered: dict[str, np.ndarray] = field(default_factory=dict)
    role: np.ndarray | None = None

    def __len__(self) -> int:
        """What a step draws: pairs where ``sequences_per_row`` is 2, else sequences."""
        return len(self.record) // self.sequences_per_row

    def sequence(self, index: int) -> Sequence:
        start, end = self.offsets[index], self.offsets[index + 1]
        return Sequence(
            self.input_ids[start:end], self.loss_weight[start:end], int(self.record[index]), int(self.label[index])
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every sequence, (sequences,)."""
        return np.diff(self.offsets)

    @property
    def continues(self) -> np.ndarray:
        """Sequences that go on with the text of the one before, its last token repeated as their first, (sequences,)."""
        record = np.asarray(self.record)
        same = np.zeros(len(record), bool)
        if self.sequences_per_row == 1:
            same[1:] = record[1:] == record[:-1]
        return same

    def trained_counts(self) -> np.ndarray:
        """Trained tokens of every sequence, (sequences,); the first token of a sequence can never be a target."""
        counts = np.zeros(len(self.record), np.int64)
        for first in range(0, len(counts), CHUNK):
            ends = np.asarray(self.offsets[first : first + CHUNK + 1])
            trained = np.asarray(self.loss_weight[ends[0] : ends[-1]]) > 0
            ends = ends - ends[0]
            trained[ends[:-1][np.diff(ends) > 0]] = False
            sums = np.concatenate([[0], np.cumsum(trained)])
            counts[first : first + CHUNK] = sums[ends[1:]] - sums[ends[:-1]]
        return counts

    def fingerprint(self) -> str:
        """Hash of all ids and weights: what the loss can depend on."""
        digest = hashlib.sha256()
        for array in (self.input_ids, self.loss_weight, self.offsets, self.label):
            _add(digest, array)
        for name, values in sorted(self.remembered.items()):
            digest.update(name.encode())
            _add(digest, values)
        return digest.hexdigest()[:16]

    def with_weights(self, loss_weight: np.ndarray) -> TokenTable:
        return replace(self, loss_weight=loss_weight.astype(np.float32))

    def with_remembered(self, values: dict[str, np.ndarray]) -> TokenTable:
        """With further numbers of every token, (tokens,) each."""
        added = {name: np.asarray(numbers, np.float32) for name, numbers in values.items()}
        return replace(self, remembered=self.remembered | added)

    def with_role(self, role: np.ndarray) -> TokenTable:
        return replace(self, role=role.astype(np.uint8))

    def rows(self, ids: np.ndarray) -> TokenTable:
        """A table of these rows (positions in this table), in this order."""
        per = self.sequences_per_row
        wanted = (np.asarray(ids, dtype=np.int64)[:, None] * per + np.arange(per)).reshape(-1)
        lengths = self.lengths[wanted]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        take = (
            np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in wanted])
            if len(wanted)
            else np.zeros(0, np.int64)
        )
        return TokenTable(
            self.input_ids[take],
            self.loss_weight[take],
            offsets,
            self.record[wanted],
            self.label[wanted],
            per,
            {name: values[take] for name, values in self.remembered.items()},
            None if self.role is None else self.role[take],
        )

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("input_ids", "loss_weight", "offsets", "record", "label"):
            np.save(folder / f"{name}.npy", np.asarray(getattr(self, name)))
        (folder / "sequences_per_row").write_text(str(self.sequences_per_row))

    @classmethod
    def open(cls, folder: Path) -> TokenTable:
        """Memory-map what ``save`` wrote."""
        names = ("input_ids", "loss_weight", "offsets", "record", "label")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        return cls(**arrays, sequences_per_row=int((folder / "sequences_per_row").read_text()))

    @classmethod
    def from_sequences(cls, sequences: list[Sequence], sequences_per_row: int = 1) -> TokenTable:
        ids = [s.input_ids for s in sequences]
        offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype(np.int64)
        return cls(
            np.concatenate(ids).astype(np.int32) if ids else np.zeros(0, np.int32),
            np.concatenate([s.loss_weight for s in sequences]).astype(np.float32) if ids else np.zeros(0, np.float32),
            offsets,
            np.array([s.record for s in sequences], np.int64),
            np.array([s.label for s in sequences], np.int64),
            sequences_per_row,
        )


def _add(digest: hashlib._Hash, array: np.ndarray) -> None:
    """The bytes of an array, which may not fit into memory as a whole."""
    for start in range(0, len(array), HASHED):
        digest.update(np.ascontiguousarray(array[start : start + HASHED]).data)


def first_places(table: TokenTable) -> np.ndarray:
    """Place in the table of the first trained token of every sequence that has one; the first token never is."""
    trained = np.asarray(table.loss_weight) > 0
    trained[table.offsets[:-1][table.lengths > 0]] = False
    places = np.flatnonzero(trained)
    owner = np.searchsorted(table.offsets, places, side="right")
    return places[np.diff(owner, prepend=-1) != 0]
