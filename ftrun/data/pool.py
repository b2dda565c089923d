"""All rows of ``data.path`` as one list that never lies in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ftrun.config.settings import DataConfig
from ftrun.data.formats import Layout, layout_of
from ftrun.data.raw import Reading
from ftrun.data.records import Kind, Record
from ftrun.data.sources import read
from ftrun.data.spool import Spool, Stores
from ftrun.errors import ConfigError, DataError

NAMED = 5  # rows left out that a note names
CHUNK = 65_536  # rows hashed at a time
READ = 4096  # rows whose places are looked up at a time


@dataclass(eq=False)
class Pool:
    """Rows by id. An id is the row's number in the whole pool, from 0, in a subset too; iteration goes in order of ``ids``."""

    index: np.ndarray  # (rows of the whole pool,) entries, see spool.ENTRY
    ids: np.ndarray  # (rows,) int64
    stores: Stores
    files: list[str]
    layouts: list[Layout]  # one a source
    names: list[str] = field(default_factory=list)  # that rows give as their source
    splits: bool = False  # whether a source has splits, so that data.split chose
    notes: list[str] = field(default_factory=list)  # what a user should be told: counts used of each source

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), READ):
            ids = self.ids[start : start + READ]
            for id, entry in zip(ids.tolist(), self.index[ids].tolist(), strict=True):
                store, first, length, source, file, line, *_ = entry
                layout = self.layouts[source]
                fields = self.stores.fields(store, first, length)
                yield layout.with_system(layout.record(id, fields, f"{self.files[file]}:{line}"))

    def __getitem__(self, id: int) -> Record:
        """The row with this id; KeyError if it is not in the pool."""
        layout = self.layouts[self._entry(id)["source"]]
        return layout.with_system(layout.record(int(id), self.fields(id), self.origin(id)))

    def fields(self, id: int) -> dict[str, Any]:
        """The row as it was read."""
        entry = self._entry(id)
        return self.stores.fields(int(entry["store"]), int(entry["start"]), int(entry["length"]))

    def origin(self, id: int) -> str:
        """``file:line`` that the row was read from."""
        entry = self._entry(id)
        return f"{self.files[entry['file']]}:{entry['line']}"

    @property
    def sources(self) -> list[str | None]:
        """What the field ``source`` of every row says, (rows,); without one, the file of a mixture of several."""
        entries = self.index[self.ids]
        told = self.names
        if len(self.layouts) == 1:
            return [told[number] if number >= 0 else None for number in entries["named"].tolist()]
        files = [file.rpartition("/")[2] for file in self.files]
        pairs = zip(entries["named"].tolist(), entries["file"].tolist(), strict=True)
        return [told[number] if number >= 0 else files[file] for number, file in pairs]

    @property
    def kind(self) -> Kind:
        return self.layouts[0].kind

    @property
    def format(self) -> str:
        return " + ".join(dict.fromkeys(layout.format for layout in self.layouts))

    @cached_property
    def hashes(self) -> np.ndarray:
        """64-bit hash of what each row says, (rows,) uint64; independent of file, layout, position and further columns."""
        return self.index["content"][self.ids]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all rows, every field included, in order."""
        digest = hashlib.sha256()
        for start in range(0, len(self), CHUNK):
            entries = self.index[self.ids[start : start + CHUNK]]
            digest.update(entries["content"].tobytes() + entries["row"].tobytes())
        return digest.hexdigest()[:32]

    @cached_property
    def chosen(self) -> str:
        """Hash of the ids, in their order: which rows of the whole pool these are."""
        return hashlib.sha256(np.ascontiguousarray(self.ids).data).hexdigest()[:16]

    def subset(self, ids: np.ndarray | list[int]) -> Pool:
        """These rows in this order, under their ids. KeyError if one is not in the pool."""
        wanted = np.asarray(ids, dtype=np.int64)
        missing = wanted[~np.isin(wanted, self._sorted_ids)]
        if len(missing):
            raise KeyError(int(missing[0]))
        return replace(self, ids=wanted)

    @cached_property
    def _sorted_ids(self) -> np.ndarray:
        return np.sort(self.ids)

    def _entry(self, id: int) -> np.void:
        place = int(np.searchsorted(self._sorted_ids, id))
        if place == len(self.ids) or self._sorted_ids[place] != id:
            raise KeyError(id)
        return self.index[id]


def load_pool(data: DataConfig, folder: Path, seed: int) -> Pool:
    """Read, check and index all rows of ``data.path``; work files go into ``folder``. Raises DataError, ConfigError."""
    paths = [data.path] if isinstance(data.path, str) else list(data.path)
    _check_settings(data, paths)
    stop = data.limit if len(paths) == 1 else None
    spool = Spool(folder)
    reading = Reading(data.split, data.columns)
    notes = reading.notes
    try:
        layouts = [_read_source(path, number, data, spool, stop, reading) for number, path in enumerate(paths)]
    except BaseException:
        spool.abandon()
        raise
    index, stores = spool.close()
    _check_kinds(layouts, paths)
    ids = np.flatnonzero(index["length"] > 0)  # rows left out keep their numbers
    if not len(ids):
        raise DataError("none of the rows can be used", f"data.path={data.path}", notes[-1])
    if len(paths) > 1:
        index = index[ids]
        sizes = np.bincount(index["source"], minlength=len(paths))
        counts = mixture_counts(sizes, data.weights, data.limit)
        index = index[_mixture(sizes, counts, seed)]
        ids = np.arange(len(index))
        notes += [
            _mixture_note(path, int(size), int(count)) for path, size, count in zip(paths, sizes, counts, strict=True)
        ]
    return Pool(index, ids, stores, spool.files, layouts, spool.names, reading.splits, notes)


def _check_settings(data: DataConfig, paths: list[str]) -> None:
    if not paths:
        raise ConfigError("data.path names no source", "data.path=[]", "Name a file, or leave it out for the default.")
    if data.limit is not None and data.limit < 1:
        raise ConfigError("data.limit must be at least 1", f"data.limit={data.limit}", "Leave it out to use all rows.")
    if data.weights is not None:
        if len(data.weights) != len(paths):
            raise ConfigError(
                f"data.weights has {len(data.weights)} weights for {len(paths)} sources",
                "data.weights",
                "Give one weight a source.",
            )
        if not all(np.isfinite(weight) and weight >= 0 for weight in data.weights) or sum(data.weights) <= 0:
            raise ConfigError("data.weights must not be negative, and not all zero", f"data.weights={data.weights}")


def _read_source(path: str, number: int, data: DataConfig, spool: Spool, stop: int | None, reading: Reading) -> Layout:
    layout: Layout | None = None
    unfit: list[str] = []
    for row, raw in enumerate(read(path, reading)):
        if row == stop:
            break
        where = f"{raw.file}:{raw.line}"
        if layout is None:
            layout = layout_of(raw.fields, where, data.format, data.columns, data.system, tuple(data.ignore))
        try:
            record = layout.record(row, raw.fields, where)
        except DataError as error:
            if data.unfit == "error":
                error.todo += " Or leave such rows out: data.unfit=drop."
                raise
            unfit.append(error.what)
            record = None
        spool.add(raw, number, record)
    if layout is None:
        raise DataError(f"{path} holds no rows", f"data.path={path}")
    if unfit:
        named = "; ".join(unfit[:NAMED]) + f"; and {len(unfit) - NAMED:,} more" * (len(unfit) > NAMED)
        reading.notes.append(
            f"{len(unfit):,} row{'s' * (len(unfit) != 1)} of {path} left out (data.unfit=drop): {named}"
        )
    return layout


def refuse_idle_split(pool: Pool, data: DataConfig) -> None:
    """Refuse a ``data.split`` that chose nothing, because no source of the pool has splits. Raises DataError."""
    if pool.splits or data.split == "train":  # all rows of a source without splits are its training rows
        return
    raise DataError(
        f"data.split={data.split} chooses nothing: {data.path if isinstance(data.path, str) else ', '.join(data.path)} has no splits",
        f"data.split={data.split}",
        "Leave data.split out, or name a folder with files of several splits, or a hub data set.",
    )


def _check_kinds(layouts: list[Layout], paths: list[str]) -> None:
    for layout, path in zip(layouts, paths, strict=True):
        if layout.kind != layouts[0].kind:
            raise DataError(
                f"{path} holds {layout.format} rows, {paths[0]} holds {layouts[0].format}: they cannot be trained together",
                "data.path",
                "Mix sources of one kind only.",
            )


# ---- mixtures ----


def mixture_counts(sizes: np.ndarray, weights: list[float] | None, limit: int | None) -> np.ndarray:
    """Rows to take of each source, (sources,): shares by weight (without weights: by size) of all rows, or of ``limit``."""
    total = int(sizes.sum()) if limit is None or (weights is None and limit > sizes.sum()) else limit
    exact = np.asarray(sizes if weights is None else weights, dtype=np.float64)
    exact = exact / exact.sum() * total
    counts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: total - int(counts.sum())]] += 1
    return counts


def _mixture(sizes: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Index entries of the mixture: whole repetitions of a source, then a random part of it, in the source's order."""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    picked = []
    for source, (size, count, start) in enumerate(zip(sizes, counts, starts, strict=True)):
        part = np.random.default_rng([seed, source]).permutation(int(size))[: int(count % size)]
        picked += [start + np.tile(np.arange(size), int(count // size)), start + np.sort(part)]
    return np.concatenate(picked).astype(np.int64)


def _mixture_note(path: str, size: int, count: int) -> str:
    times = f", each {count / size:.2f} times on average" if count > size else ""
    return f"{path}: {count:,} rows used, {size:,} there{times}"


# ---- held-out rows ----


def split_heldout(pool: Pool, share: float, seed: int) -> tuple[Pool, Pool]:
    """Training rows and held-out rows. A row's side depends on its content and the seed only.

    Of a pool so small that no row falls into the share the row nearest to it is held out.
    """
    if not 0 <= share < 1:
        raise ConfigError(
            "data.heldout must be at least 0 and below 1", f"data.heldout={share}", "0.05 keeps 5% of the rows."
        )
    number = _uniform(pool.hashes, seed)
    held = number < share
    if share > 0 and not held.any() and number.min(initial=1.0) < number.max(initial=0.0):
        held = number == number.min()
    if len(pool) and held.all():
        raise DataError(
            "no row is left to train on: all were held out",
            f"data.heldout={share}",
            "Give more rows, or data.heldout=0.",
        )
    return pool.subset(pool.ids[~held]), pool.subset(pool.ids[held])


def train_and_heldout(pool: Pool, data: DataConfig, folder: Path, seed: int) -> tuple[Pool, Pool]:
    """Training rows and the rows to evaluate on: of ``data.heldout_path``, or a share of the pool; at most ``heldout_limit``.

    Training rows that say the same as a row of ``heldout_path`` are left out, and the notes say how many.
    """
    notes = list(pool.notes)
    if data.heldout_path is None:
        train, held = split_heldout(pool, data.heldout, seed)
        if data.heldout > 0 and not len(held):
            notes.append(
                f"none of the {len(pool):,} rows fell into the held-out share of {data.heldout:.0%}: nothing is held out"
            )
    else:
        held = load_pool(replace(data, path=data.heldout_path, weights=None, limit=None), folder / "heldout", seed)
        notes += [note for note in held.notes if note not in notes]
        if held.kind != pool.kind:
            raise DataError(
                f"data.heldout_path holds {held.format} rows, data.path holds {pool.format}",
                f"data.heldout_path={data.heldout_path}",
            )
        seen = np.isin(pool.hashes, held.hashes)
        train = pool.subset(pool.ids[~seen])
        if seen.any():
            notes.append(f"{int(seen.sum()):,} training rows are also in {data.heldout_path}: left out of training")
        if not len(train):
            raise DataError(
                "no row is left to train on: all are in data.heldout_path too", f"data.heldout_path={data.heldout_path}"
            )
    kept = limit_heldout(held, data.heldout_limit, seed)
    if len(kept) < len(held):
        notes.append(f"{len(kept):,} of {len(held):,} held-out rows are evaluated (data.heldout_limit)")
    return replace(train, notes=notes), kept


def limit_heldout(pool: Pool, limit: int, seed: int) -> Pool:
    """At most ``limit`` rows, drawn by content; the order stays."""
    if limit < 0:
        raise ConfigError("data.heldout_limit must not be negative", f"data.heldout_limit={limit}")
    if len(pool) <= limit:
        return pool
    first = np.argsort(_uniform(pool.hashes, seed + 1), kind="stable")[:limit]
    return pool.subset(pool.ids[np.sort(first)])


def _uniform(hashes: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each hash, another one for each seed (the mixing steps of splitmix64)."""
    mixed = hashes + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))).astype(np.float64) / 2.0**64
