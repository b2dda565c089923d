"""The scoring engine: what a model says of many texts, in token-budget batches, the same bits however they are run.

Batches are cut from the length-sorted texts of the whole request, ties broken by content, and dealt to the processes
as wholes. So neither the order of the rows nor the number of processes can change a score. Shapes are multiples of 16,
since kernels add up the odd remainder of a shape in another order: with them the batch size does not matter either.
Equal texts are computed once, whoever asks for them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import time
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ftrun import registry
from ftrun.data.batches import Batch, collate, cut_batches, token_budget
from ftrun.data.counts import count_row_tokens
from ftrun.data.ragged import Ragged
from ftrun.data.tokens import TokenTable
from ftrun.errors import ComponentError, DataError
from ftrun.models.fast import packs_for_free
from ftrun.models.head import token_nll
from ftrun.runs import code
from ftrun.runs.artifacts import digest, disk_guard

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.models.bundle import Bundle
    from ftrun.runs.progress import Reporter
    from ftrun.training.distributed import Team

# what is taken from one batch: an array a sequence, in the order of the batch
Measure = Callable[["Bundle", Batch], list[np.ndarray]]

KEY_BYTES = 16
ALIGNED = 16  # tokens and predicted positions come in multiples of this
PREDICTED_AT_ONCE = 512  # positions


def segments(texts: Iterable[tuple[Sequence[int], Sequence[int]]]) -> TokenTable:
    """A table of (context, target) token ids in which only the target tokens are asked for."""
    ids, before = Ragged(), array("q")
    for context, target in texts:
        ids.append([*context, *target])
        before.append(len(context))
    lengths, given = ids.lengths, np.array(before, np.int64)
    asked = np.ones(int(lengths.sum()), np.float32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    for start, count in zip(offsets[:-1].tolist(), given.tolist(), strict=True):
        asked[start : start + count] = 0
    number = np.arange(len(lengths), dtype=np.int64)
    return TokenTable(ids.ids, asked, offsets, number, np.full(len(lengths), -1, np.int64))


@dataclass
class Scoring:
    """Scores texts with one model.

    A text is a sequence of a TokenTable; its tokens of weight above 0 are those asked for. Finished work lies below
    ``shards`` until ``discard``, so that a scoring that was killed goes on where it stopped.
    """

    load: Callable[[], Bundle]  # called when the first score is asked for
    team: Team
    report: Reporter
    batch_tokens: int | None = (
        None  # upper bound of the tokens in one batch, padding included; None: as the device likes
    )
    shards: Path | None = None  # folder for finished work; None keeps it in memory only
    shard_seconds: float = 15.0  # at most this much work is lost when the process is killed
    reasons: dict[int, str] = field(default_factory=dict)  # row -> why a scorer could not score it
    embeddings: np.ndarray | None = None  # (rows, width) of the pool, where a scorer made them: pickers use them again
    similarity: Similarity | None = None  # of the pool's rows to the queries, where a scorer looks for something
    own_tokenizer: Any = None  # the model's tokenizer, where it is there before the model
    computed: int = 0  # sequences that this process has run through the model
    _counted: tuple[Pool, np.ndarray] | None = field(default=None, repr=False)
    _known: dict[tuple[str, bytes], np.ndarray] = field(default_factory=dict, repr=False)

    @cached_property
    def bundle(self) -> Bundle:
        return self.load()

    @property
    def tokenizer(self) -> Any:
        return self.own_tokenizer or self.bundle.tokenizer

    def row_tokens(self, pool: Pool) -> np.ndarray:
        """Tokens of all texts of each row, template not counted, (rows,); counted once for a pool."""
        if self._counted is None or self._counted[0] is not pool:
            self._counted = pool, count_row_tokens(self.tokenizer, pool)
        return self._counted[1]

    def with_model(self, load: Callable[[], Bundle]) -> Scoring:
        """The same engine for another model: a reference, an encoder."""
        return Scoring(load, self.team, self.report, self.batch_tokens, self.shards, self.shard_seconds)

    def token_nll(self, texts: TokenTable, title: str = "score") -> np.ndarray:
        """Negative log-likelihood of every token asked for, (tokens,) float32; NaN elsewhere.

        The first token of a sequence has nothing to be predicted from and stays NaN. ``title`` names the progress bar.
        """
        result = np.full(len(texts.input_ids), np.nan, np.float32)
        texts = replace(texts, sequences_per_row=1)
        asked = np.flatnonzero(texts.trained_counts() > 0)
        found = self.measure(texts.rows(asked), "nll", nll_of_batch, title, packable=True)
        for index, nll in zip(asked, found, strict=True):
            first, end = int(texts.offsets[index]), int(texts.offsets[index + 1])
            result[first + 1 : end][np.asarray(texts.loss_weight[first + 1 : end]) > 0] = nll
        return result

    def mean_nll(self, texts: TokenTable, title: str = "score") -> np.ndarray:
        """Mean over the predictable tokens asked for of each sequence, (sequences,); NaN where there is none."""
        nll = self.token_nll(texts, title).astype(np.float64)
        sequences = len(texts.lengths)
        known = ~np.isnan(nll)
        owner = np.repeat(np.arange(sequences), texts.lengths)[known]
        count = np.bincount(owner, minlength=sequences)
        total = np.bincount(owner, weights=nll[known], minlength=sequences)
        return np.divide(total, count, out=np.full(sequences, np.nan), where=count > 0)

    def measure(
        self, texts: TokenTable, name: str, compute: Measure, title: str = "score", packable: bool = False
    ) -> list[np.ndarray]:
        """What ``compute`` takes from every sequence, flat float32 arrays in the order of ``texts``.

        ``name`` tells measures apart: a sequence measured under the same name before is not computed again.
        ``packable``: it reads several sequences in one row of a batch as well as one; models that keep them apart at
        no cost then waste nothing on padding.
        """
        keys = [_content_key(texts, index) for index in range(len(texts.lengths))]
        places = {key: index for index, key in enumerate(keys) if (name, key) not in self._known}
        if places:
            self._run(texts, name, compute, sorted(places), places, title, packable)
        return [self._known[name, key] for key in keys]

    def forget(self, name: str) -> None:
        """Free the memory of a measure; asked for again it comes from the shards, or is computed anew."""
        for known in [known for known in self._known if known[0] == name]:
            del self._known[known]

    def discard(self) -> None:
        """Remove the shards; called once what was made from them is written."""
        self.team.barrier()
        if self.shards is not None and self.team.rank == 0:
            shutil.rmtree(self.shards, ignore_errors=True)

    def _run(
        self,
        texts: TokenTable,
        name: str,
        compute: Measure,
        order: list[bytes],
        places: dict[bytes, int],
        title: str,
        packable: bool,
    ) -> None:
        """Measure the sequences ``order`` (content keys, sorted) on all processes, into ``_known``."""
        lengths = np.asarray(texts.lengths)[[places[key] for key in order]]
        self._check_length(int(lengths.max()))
        packed = packable and packs_for_free(self.bundle.model, self.bundle.architecture)
        budget = token_budget(self.batch_tokens, self.bundle.device)
        batches = cut_batches(lengths if packed else _aligned(lengths), budget, packed)
        mine = [
            [order[position] for row in batch for position in row]
            for batch in batches[self.team.rank :: self.team.world_size]
        ]
        folder = self._folder(name, compute)
        done = self._read_shards(folder, {key for batch in mine for key in batch})
        tokens = {key: int(length) for key, length in zip(order, lengths, strict=True)}
        total = sum(tokens[key] for batch in mine for key in batch)
        fresh: dict[bytes, np.ndarray] = {}
        written = time.monotonic()
        start = sum(tokens[key] for key in done)
        with (
            self.report.task(title, total, unit="tokens", start=start) as task,
            _inference(self.bundle.model),
        ):
            try:
                for batch in mine:
                    missing = [key for key in batch if key not in done]
                    if not missing:
                        continue
                    fresh |= self._compute(texts, name, compute, missing, places, packed)
                    task.advance(sum(tokens[key] for key in missing))
                    if time.monotonic() - written >= self.shard_seconds:
                        done |= self._write_shard(folder, fresh)
                        fresh, written = {}, time.monotonic()
            finally:  # what was finished before an error or a signal counts
                done |= self._write_shard(folder, fresh)
        for packed in self.team.gather_object(_pack(done)):
            self._known |= {(name, key): values for key, values in _unpack(packed).items()}

    def _compute(
        self,
        texts: TokenTable,
        name: str,
        compute: Measure,
        keys: list[bytes],
        places: dict[bytes, int],
        packed: bool,
    ) -> dict[bytes, np.ndarray]:
        indices = [places[key] for key in keys]
        batch = aligned_batch(texts, indices, packed, self.bundle)
        values = [np.asarray(value, np.float32).reshape(-1) for value in compute(self.bundle, batch)]
        for value in values:
            if not np.isfinite(value).all():
                raise ComponentError(
                    f"{self.bundle.path} gives a {name} that is not finite",
                    todo="Score in a wider type with model.dtype=float32, or with another model: select.model.path=...",
                )
        self.computed += len(keys)
        return dict(zip(keys, values, strict=True))

    def _check_length(self, longest: int) -> None:
        if longest > self.bundle.context_length:
            raise DataError(
                f"a text of {longest} tokens is longer than the {self.bundle.context_length} that {self.bundle.path} can attend to",
                todo="Lower the scorer's max_length (select.max_length=...), or score with another model: select.model.path=...",
            )

    # ---- shards: finished work on disk ----

    def _folder(self, name: str, compute: Measure) -> Path | None:
        """Where finished work of this model lies, made by this code."""
        if self.shards is None:
            return None
        made = digest([self.bundle.computes, _made_by(getattr(compute, "func", compute).__module__)])
        return self.shards / f"{name}-{self.bundle.fingerprint}-{made}"

    def _read_shards(self, folder: Path | None, wanted: set[bytes]) -> dict[bytes, np.ndarray]:
        found: dict[bytes, np.ndarray] = {}
        if folder is None or not folder.is_dir():
            return found
        for file in sorted(folder.glob("*.npz")):
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    shard = _unpack(dict(arrays))
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                self.report.warn(f"{file} is damaged; its texts are scored again")
                continue
            found |= {key: values for key, values in shard.items() if key in wanted}
        return found

    def _write_shard(self, folder: Path | None, fresh: dict[bytes, np.ndarray]) -> dict[bytes, np.ndarray]:
        """Write a shard, named after its content, beside and rename it; returns ``fresh``."""
        if folder is not None and fresh:
            file = folder / f"{hashlib.blake2b(b''.join(fresh), digest_size=KEY_BYTES).hexdigest()}.npz"
            beside = file.with_name(f".{file.stem}.{os.getpid()}")
            packed: dict[str, Any] = _pack(fresh)
            with disk_guard(file):
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    with beside.open("wb") as out:
                        np.savez(out, **packed)
                    beside.replace(file)
                finally:
                    beside.unlink(missing_ok=True)
        return fresh


@functools.cache
def _made_by(measure: str) -> str:
    """Hash of the code and the libraries behind a measure of this module."""
    apart = {slot: [] for slot in registry.SLOTS}  # what the module has imported is enough
    return digest([code.sources([__name__, measure], apart), code.versions()])


@contextmanager
def _inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the model's mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def nll_of_batch(bundle: Bundle, batch: Batch) -> list[np.ndarray]:
    """Negative log-likelihood of every token asked for, an array a sequence: the measure of `Scoring.token_nll`."""
    hidden = bundle.architecture.hidden_states(bundle.model, batch)[batch.predicting]
    head = bundle.architecture.head(bundle.model)
    padding = -len(hidden) % ALIGNED
    hidden, targets = F.pad(hidden, (0, 0, 0, padding)), F.pad(batch.target_ids, (0, padding))
    parts = zip(hidden.split(PREDICTED_AT_ONCE), targets.split(PREDICTED_AT_ONCE), strict=True)
    nll = torch.cat([token_nll(states, head, ids) for states, ids in parts])[: batch.trained_tokens]
    counts = torch.bincount(batch.target_sequence, minlength=batch.sequences).cpu().numpy()
    return np.split(nll.float().cpu().numpy(), np.cumsum(counts)[:-1])


def aligned_batch(texts: TokenTable, indices: list[int], packed: bool, bundle: Bundle) -> Batch:
    """These sequences in one row, or one a row, at a width that rounds as any other does; on the model's device."""
    batch = collate(texts, [indices] if packed else [[index] for index in indices], bundle.pad_id)
    widest = batch.input_ids.shape[1]
    time = int(_aligned(widest)) if packed else min(int(_aligned(widest)), max(widest, bundle.context_length))
    return _padded(batch, time, bundle.pad_id).to(bundle.device)


def _aligned(lengths: Any) -> Any:
    return -(-lengths // ALIGNED) * ALIGNED


def _padded(batch: Batch, time: int, pad_id: int) -> Batch:
    """The batch with padding on the right up to ``time`` tokens; in a packed one it is a document of its own."""
    width = batch.input_ids.shape[1]
    room = (0, time - width)
    first = 0 if batch.packed else width
    more = torch.arange(first, first + time - width)
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, room, value=pad_id),
        loss_weight=F.pad(batch.loss_weight, room),
        sequence=F.pad(batch.sequence, room, value=-1),
        position_ids=torch.cat([batch.position_ids, more.expand(len(batch.input_ids), -1)], 1),
    )


def _content_key(texts: TokenTable, index: int) -> bytes:
    """Hash of the ids and of which tokens are asked for."""
    item = texts.sequence(index)
    digest = hashlib.blake2b(np.ascontiguousarray(item.input_ids, np.int32).tobytes(), digest_size=KEY_BYTES)
    digest.update(np.packbits(np.asarray(item.loss_weight) > 0).tobytes())
    return digest.digest()


def _pack(values: dict[bytes, np.ndarray]) -> dict[str, np.ndarray]:
    """Many small arrays as three large ones."""
    return {
        "keys": np.frombuffer(b"".join(values), np.uint8),
        "ends": np.cumsum([len(value) for value in values.values()], dtype=np.int64),
        "values": np.concatenate([np.zeros(0, np.float32), *values.values()]),
    }


def _unpack(packed: dict[str, np.ndarray]) -> dict[bytes, np.ndarray]:
    keys = packed["keys"].tobytes()
    parts = np.split(packed["values"], packed["ends"])[:-1]
    return {keys[KEY_BYTES * i : KEY_BYTES * (i + 1)]: part for i, part in enumerate(parts)}


@dataclass
class Similarity:
    """How near the rows are to queries. ``matrix``: (queries, rows), higher is nearer; ``task``: (queries,)."""

    matrix: np.ndarray
    task: np.ndarray
