"""The preflight: every row rendered, checked and stored as tokens, before any training begins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ftrun.config.settings import DataConfig
from ftrun.data.encode import tokenizer_fingerprint
from ftrun.data.pool import Pool
from ftrun.data.records import Record
from ftrun.data.render import Renderer
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.runs.artifacts import disk_guard, is_whole, whole_folder
from ftrun.runs.stagecache import Key, key_of
from ftrun.runs.worklock import WorkLock

if TYPE_CHECKING:
    from ftrun.runs.progress import Reporter

BATCH = 256  # rows tokenised at a time
AUTO_SHARE = 0.01  # overlong=auto refuses when more than this share of the rows is too long
NAMED = 5  # rows that an error names
TOO_LONG, NO_ROOM = "longer than max_length", "no response token within max_length"


@dataclass
class Prepared:
    table: TokenTable
    kept: np.ndarray  # (rows,) ids, in the table's order, each once
    dropped: dict[str, list[int]]  # reason -> ids
    truncated: list[int] = field(default_factory=list)  # ids
    labels: list[str | int] = field(default_factory=list)  # class names by index, for kind "labels"
    notes: list[str] = field(default_factory=list)


def prepare(
    pool: Pool,
    tokenizer: Any,
    data: DataConfig,
    *,
    context_length: int,
    vocab_size: int,
    folder: Path,
    report: Reporter | None = None,
    labels: list[str | int] | None = None,
) -> Prepared:
    """Tokens of the pool's rows, from the cache in ``folder`` if they are there. Raises DataError, ConfigError.

    ``labels`` are the classes of the training rows, when held-out rows are prepared.
    """
    if not len(pool):
        raise DataError("there are no rows to prepare", "data.path")
    max_length = context_length if data.max_length is None else data.max_length
    if max_length > context_length:
        raise ConfigError(
            f"data.max_length={max_length} is more than the {context_length} tokens that the model can attend to",
            f"data.max_length={max_length}",
            f"Use data.max_length={context_length} or less.",
        )
    if max_length < 2:
        raise ConfigError(
            "data.max_length must be at least 2",
            f"data.max_length={max_length}",
            "A row needs a token to predict from, and one to predict.",
        )
    if pool.kind == "labels" and labels is None:
        labels = sorted(
            {record.label for record in pool if record.label is not None},
            key=lambda label: (isinstance(label, str), label),
        )
    key = cache_key(pool, tokenizer, data, max_length, vocab_size, labels)
    target = folder / key.digest
    if not is_whole(target):
        say = report.note if report else lambda _: None
        with WorkLock(folder / f".{key.digest}.lock", say):  # a machine's processes, or several runs, want the same
            if not is_whole(target):
                renderer = Renderer(tokenizer, data.train_on, labels or ())
                with whole_folder(target) as beside:
                    _Preflight(pool, renderer, data, max_length, vocab_size).run(beside, report)
                    key.write(beside)
    stored = json.loads((target / "prepared.json").read_text())
    table = TokenTable.open(target)
    return Prepared(
        table,
        np.asarray(table.record[:: table.sequences_per_row])[~table.continues[:: table.sequences_per_row]],
        stored["dropped"],
        stored["truncated"],
        list(labels or []),
        stored["notes"],
    )


def cache_key(
    pool: Pool, tokenizer: Any, data: DataConfig, max_length: int, vocab_size: int, labels: list[str | int] | None
) -> Key:
    """All that the tokens depend on, the code that makes them included."""
    ids = pool.chosen if len(pool) < len(pool.index) else len(pool)
    asked = ("overlong", "unfit", "train_on", "system", "format", "columns")
    settings = {name: getattr(data, name) for name in asked} | {"ignore": sorted(data.ignore), "max_length": max_length}
    what = {
        "settings": settings,
        "rows": [pool.fingerprint, ids, pool.format],
        "tokenizer": [tokenizer_fingerprint(tokenizer), vocab_size],
        "labels": labels,
    }
    return key_of("tokens", what, modules=[__name__], libraries=("tokenizers", "transformers", "numpy"))


class _Preflight:
    """One pass over the pool: sequences go to disk, what cannot be trained is counted by reason."""

    def __init__(self, pool: Pool, renderer: Renderer, data: DataConfig, max_length: int, vocab_size: int):
        self.pool, self.renderer, self.data, self.vocab_size = pool, renderer, data, vocab_size
        self.max_length = max_length
        self.dropped: dict[str, list[int]] = {}
        self.unfit: dict[str, list[int]] = {}  # what cannot be trained, where such rows are left out
        self.truncated: list[int] = []
        self.longest: dict[int, int] = {}  # tokens of the first rows that are too long
        self.split = self.pieces = 0  # rows cut into pieces, and how many those are
        self.labelled = pool.kind == "labels"
        self.prompts_only = pool.kind == "prompts"

    def run(self, folder: Path, report: Reporter | None) -> None:
        per_row = 2 if self.pool.kind == "pairs" else 1
        with _Columns(folder) as columns:
            for batch in self._batches(report):
                where = [self.pool.origin(record.id) for record in batch]
                for record, place, sequences in zip(batch, where, self._rendered(batch, where), strict=True):
                    kept = self._fitting(record, place, sequences)
                    if kept:
                        columns.add(kept)
            rows = columns.sequences // per_row
        self._refuse_none_fits(rows)
        self._refuse_overlong(rows)
        (folder / "sequences_per_row").write_text(str(per_row))
        stored = {"dropped": self.dropped | self.unfit, "truncated": self.truncated, "notes": self._notes()}
        (folder / "prepared.json").write_text(json.dumps(stored))

    def _batches(self, report: Reporter | None) -> Iterator[list[Record]]:
        rows = iter(self.pool)
        if report is None:
            while batch := list(islice(rows, BATCH)):
                yield batch
            return
        with report.task("tokenising", len(self.pool), "rows") as task:
            while batch := list(islice(rows, BATCH)):
                yield batch
                task.advance(len(batch))

    def _rendered(self, batch: list[Record], where: list[str]) -> list[list[Sequence]]:
        """Sequences of each row; none of one that cannot be trained, where such rows are left out."""
        if self.data.unfit == "error":
            try:
                return self.renderer.batch(batch, where)
            except DataError as error:
                error.todo += " Or leave such rows out: data.unfit=drop."
                raise
        refused: dict[int, DataError] = {}
        made = self.renderer.batch(batch, where, refused)
        for id, error in refused.items():
            self._leave_out(id, error)
        return made

    def _fitting(self, record: Record, where: str, sequences: list[Sequence]) -> list[Sequence]:
        """What `_check` keeps of a row that was rendered."""
        if not sequences:
            return []
        try:
            self._check_trained(record, where, sequences)
        except DataError as error:
            if self.data.unfit == "error":
                error.todo += " Or leave such rows out: data.unfit=drop."
                raise
            self._leave_out(record.id, error)
            return []
        return self._check(record, where, sequences)

    def _leave_out(self, id: int, error: DataError) -> None:
        self.unfit.setdefault(re.sub(r"^row \d+ (of \S+ )?", "", error.what), []).append(id)

    def _refuse_none_fits(self, rows: int) -> None:
        if not rows and self.unfit and not self.dropped:
            raise DataError(
                "none of the rows can be trained", f"data.path={self.data.path}", "; ".join(self._unfit_notes())
            )

    def _check_trained(self, record: Record, where: str, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if not self.labelled and not self.prompts_only and not sequence.trained:
                raise DataError(
                    f"row {record.id} of {where.rpartition(':')[0]} has nothing to train on: none of its {len(sequence.input_ids)} tokens carries loss",
                    where,
                    "Remove the row, or look at it with ftrun preview.",
                )
        if self.pool.kind == "pairs" and np.array_equal(sequences[0].input_ids, sequences[1].input_ids):
            raise DataError(
                f"row {record.id} has a chosen answer that equals the rejected one once the template has written both",
                where,
                "Neither can be preferred: repair or remove the row.",
            )

    def _check(self, record: Record, where: str, sequences: list[Sequence]) -> list[Sequence]:
        """The sequences to keep, cut if asked for; empty when the row is left out."""
        limit = self.max_length
        for sequence in sequences:
            self._refuse_unknown_ids(record, where, sequence)
        length = max(len(sequence.input_ids) for sequence in sequences)
        if length <= limit:
            return sequences
        if self.pool.kind == "text" and self.data.overlong == "auto":
            pieces = self.renderer.pieces(sequences[0], limit)
            self.split, self.pieces = self.split + 1, self.pieces + len(pieces)
            return pieces
        if len(self.longest) < NAMED:
            self.longest[record.id] = length
        if self.prompts_only:
            self.dropped.setdefault(NO_ROOM, []).append(record.id)
            return []
        cut = [self.renderer.truncated(record, sequence, limit, where) for sequence in sequences]
        if not self.labelled and not all(sequence.trained for sequence in cut):
            self.dropped.setdefault(NO_ROOM, []).append(record.id)
            return []
        if self.data.overlong == "truncate":
            self.truncated.append(record.id)
            return cut
        self.dropped.setdefault(TOO_LONG, []).append(record.id)
        return []

    def _refuse_unknown_ids(self, record: Record, where: str, sequence: Sequence) -> None:
        highest = int(sequence.input_ids.max(initial=0))
        if highest >= self.vocab_size:
            raise DataError(
                f"tokenizer and model do not fit: row {record.id} has token {highest}, the model knows {self.vocab_size}",
                where,
                "Use the model's own tokenizer.",
            )

    def _refuse_overlong(self, rows: int) -> None:
        """Raise if the setting forbids to leave these rows out, or if none is left."""
        lost = sum(map(len, self.dropped.values()))
        asked_to_drop = self.data.overlong == "drop"
        few = self.data.overlong != "error" and lost <= AUTO_SHARE * len(self.pool)
        if not lost or (rows and (asked_to_drop or few)):
            return
        no_room = len(self.dropped.get(NO_ROOM, []))
        detail = f"; in {no_room:,} of them the response starts after that" if no_room else ""
        named = ", ".join(
            f"{self.pool.origin(id)} (row {id}, {length:,} tokens)"
            for id, length in self.longest.items()
            if id not in self.truncated
        )
        if not rows:
            todo = f"Raise data.max_length (now {self.max_length})."
        elif self.data.overlong == "truncate":
            todo = "Rows without room for a response cannot be cut. Raise data.max_length, or drop them with data.overlong=drop."
        else:
            todo = "Raise data.max_length, drop such rows with data.overlong=drop, or cut them with data.overlong=truncate."
        raise DataError(
            f"{lost:,} of {len(self.pool):,} rows are longer than data.max_length={self.max_length}{detail}",
            named,
            todo,
        )

    def _unfit_notes(self) -> list[str]:
        """How many rows were left out for which reason, the most frequent reasons first."""
        reasons = sorted(self.unfit.items(), key=lambda item: -len(item[1]))
        notes = []
        for reason, ids in reasons[:NAMED]:
            named = ", ".join(map(str, ids[:NAMED])) + ", ..." * (len(ids) > NAMED)
            row = f"row{'s' * (len(ids) != 1)}"
            notes.append(
                f"{len(ids):,} {row} of {len(self.pool):,} left out (data.unfit=drop): {reason} ({row} {named})"
            )
        if rest := sum(len(ids) for _, ids in reasons[NAMED:]):
            notes.append(f"{rest:,} rows of {len(self.pool):,} left out (data.unfit=drop) for other reasons")
        return notes

    def _notes(self) -> list[str]:
        notes = [
            f"{len(ids):,} of {len(self.pool):,} rows dropped: {reason}={self.max_length}"
            for reason, ids in sorted(self.dropped.items())
        ]
        notes += self._unfit_notes()
        notes += [
            f"{count:,} of {len(self.pool):,} rows write {text} in a message: trained as text, not as that token"
            for text, count in sorted(self.renderer.spelled.items())
        ]
        if self.truncated:
            notes.append(
                f"{len(self.truncated):,} of {len(self.pool):,} rows cut to data.max_length={self.max_length} tokens"
            )
        if self.split:
            notes.append(
                f"{self.split:,} of {len(self.pool):,} rows split into {self.pieces:,} pieces of at most "
                f"data.max_length={self.max_length} tokens"
            )
        return notes


class _Columns:
    """The arrays of a TokenTable as growing .npy files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sequences = self._tokens = 0
        types = {
            "input_ids": np.int32,
            "loss_weight": np.float32,
            "offsets": np.int64,
            "record": np.int64,
            "label": np.int64,
        }
        self._files: dict[str, tuple[BinaryIO, np.dtype[Any]]] = {
            name: ((folder / f"{name}.npy").open("wb"), np.dtype(kind)) for name, kind in types.items()
        }

    def __enter__(self) -> _Columns:
        for file, kind in self._files.values():
            _write_header(file, kind, 0)
        self._append("offsets", [0])
        return self

    def add(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._tokens += len(sequence.input_ids)
            self.sequences += 1
            self._append("input_ids", sequence.input_ids)
            self._append("loss_weight", sequence.loss_weight)
            self._append("offsets", [self._tokens])
            self._append("record", [sequence.record])
            self._append("label", [sequence.label])

    def __exit__(self, *_: object) -> None:
        counts = {
            "input_ids": self._tokens,
            "loss_weight": self._tokens,
            "offsets": self.sequences + 1,
            "record": self.sequences,
            "label": self.sequences,
        }
        for name, (file, kind) in self._files.items():
            with file, disk_guard(self.folder):
                file.seek(0)
                _write_header(file, kind, counts[name])

    def _append(self, name: str, values: Any) -> None:
        file, kind = self._files[name]
        with disk_guard(self.folder):
            file.write(np.asarray(values, kind).tobytes())


def _write_header(file: BinaryIO, kind: np.dtype[Any], length: int) -> None:
    """An .npy header; numpy pads it so that the length of the first axis can grow in place."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (length,)}
    )
