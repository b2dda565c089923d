"""Batches: which rows an optimiser step trains, and how they are cut into micro-batches.

Rows of one step are sorted by length and cut where a micro-batch would pass ``batch_tokens``, so that little padding is
computed; since the loss is normalised over the whole step, the cut changes nothing but the speed.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftrun.data.tokens import TokenTable


@dataclass(frozen=True)
class Targets:
    """What is predicted where, one entry a trained token."""

    row: Tensor  # of the batch
    position: Tensor  # of the state that predicts
    ids: Tensor
    weights: Tensor
    sequence: Tensor  # number of the sequence within the batch


@dataclass
class Batch:
    """One micro-batch, padded to the right or packed.

    input_ids, loss_weight: (rows, time). sequence: (rows, time) number of the sequence that a token belongs to within
    this batch, -1 for padding. position_ids: (rows, time), restarting with every sequence. With right padding and a
    causal mask no attention mask is needed: ``packed`` tells whether several sequences share a row. remembered:
    numbers of every token by name, (rows, time) each. A token policy that arranges batches sets ``own_targets``, where
    what is predicted is not the next token of the input, ``attention``, (rows, time, time), True where the token of the
    row sees that of the column, and ``added``, (rows, time), True for inputs that it put between the data's tokens.
    """

    input_ids: Tensor
    loss_weight: Tensor
    sequence: Tensor
    position_ids: Tensor
    sequences: int  # how many sequences there are
    packed: bool
    table_index: Tensor  # (sequences,) index of each sequence in the TokenTable
    label: Tensor  # (sequences,) class, -1 where there is none
    rows: int = 0  # rows of the data set in this batch (pairs: half of the sequences)
    remembered: dict[str, Tensor] = field(default_factory=dict)
    own_targets: Targets | None = None
    attention: Tensor | None = None
    added: Tensor | None = None

    @cached_property
    def targets(self) -> Targets:
        if self.own_targets is not None:
            return self.own_targets
        row, position = self._target.nonzero(as_tuple=True)
        flat = (part[:, 1:][self._target] for part in (self.input_ids, self.loss_weight, self.sequence))
        return Targets(row, position, *flat)

    @cached_property
    def _target(self) -> Tensor:
        """Mask over positions 1..time-1: tokens that are trained."""
        same = self.sequence[:, 1:] == self.sequence[:, :-1]
        return (self.loss_weight[:, 1:] > 0) & same & (self.sequence[:, 1:] >= 0)

    @property
    def predicting(self) -> tuple[Tensor, Tensor]:
        """Index (rows, positions) of the states that predict a trained token."""
        return self.targets.row, self.targets.position

    @property
    def target_ids(self) -> Tensor:
        return self.targets.ids

    @property
    def target_weights(self) -> Tensor:
        return self.targets.weights

    @property
    def target_sequence(self) -> Tensor:
        """Sequence number of every trained token, (tokens,)."""
        return self.targets.sequence

    def remembered_targets(self, name: str) -> Tensor:
        """A remembered number of every trained token, (tokens,); not for batches with targets of their own."""
        return self.remembered[name][:, 1:][self._target]

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Row, first and end position of every sequence."""
        for row, numbers in enumerate(self.sequence.tolist()):
            start = 0
            for number, same in groupby(numbers):
                end = start + len(list(same))
                if number >= 0:
                    yield row, start, end
                start = end

    @property
    def trained_tokens(self) -> int:
        """Predictions that carry loss, those of added inputs too."""
        return int(self.target_ids.numel())

    @property
    def tokens(self) -> int:
        """Tokens of the data: neither padding nor what a token policy added is counted."""
        real = self.sequence >= 0
        return int((real if self.added is None else real & ~self.added).sum())

    @cached_property
    def attention_mask(self) -> Tensor:
        """(rows, time), 1 for real tokens; for models that are not causal."""
        return (self.sequence >= 0).long()

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        remembered = {name: values.to(device, non_blocking=True) for name, values in self.remembered.items()}
        targets = None if self.own_targets is None else Targets(**_moved(self.own_targets, device))
        return replace(self, **_moved(self, device), remembered=remembered, own_targets=targets)


def _moved(parts: Batch | Targets, device: torch.device) -> dict[str, Any]:
    """The tensors among its fields, on the device."""
    named = {field.name: getattr(parts, field.name) for field in fields(parts)}
    return {name: part.to(device, non_blocking=True) for name, part in named.items() if isinstance(part, Tensor)}


def collate(table: TokenTable, rows: list[list[int]], pad_id: int) -> Batch:
    """A batch from groups of sequence indices: one group a row of the batch, several in a group are packed."""
    parts = [[table.sequence(index) for index in group] for group in rows]
    time = max(sum(len(s.input_ids) for s in group) for group in parts)
    shape = (len(rows), time)
    ids, weight = np.full(shape, pad_id, np.int64), np.zeros(shape, np.float32)
    sequence, position = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    remembered = {name: np.full(shape, np.nan, np.float32) for name in table.remembered}
    number = 0
    for row, group in enumerate(parts):
        at = 0
        for nth, item in enumerate(group):
            end = at + len(item.input_ids)
            ids[row, at:end], weight[row, at:end] = item.input_ids, item.loss_weight
            sequence[row, at:end], position[row, at:end] = number, np.arange(end - at)
            for name, values in remembered.items():
                start = table.offsets[rows[row][nth]]
                values[row, at:end] = table.remembered[name][start : start + end - at]
            number, at = number + 1, end
        position[row, at:] = np.arange(at, time) if len(group) == 1 else np.arange(time - at)
    flat = [index for group in rows for index in group]
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(weight),
        torch.from_numpy(sequence),
        torch.from_numpy(position),
        sequences=number,
        packed=any(len(group) > 1 for group in rows),
        table_index=torch.tensor(flat),
        label=torch.from_numpy(np.asarray(table.label)[flat].astype(np.int64)),
        rows=number // table.sequences_per_row,
        remembered={name: torch.from_numpy(values) for name, values in remembered.items()},
    )


def token_budget(asked: int | None, device: torch.device) -> int:
    """Tokens of a batch: what was asked for, else what keeps this kind of device busy and leaves its caches room."""
    return asked or (1024 if device.type == "cpu" else 4096)


def length_sorted(lengths: np.ndarray, batch_tokens: int, group: int = 1) -> list[list[int]]:
    """Positions cut into micro-batches of at most ``batch_tokens`` padded tokens, longest first.

    ``group`` neighbouring positions (a pair) stay together. A single row longer than the bound is a batch of its own.
    """
    units = np.asarray(lengths).reshape(-1, group).max(axis=1)
    order = np.argsort(-units, kind="stable")
    batches: list[list[int]] = []
    for unit in order:
        members = [int(unit) * group + i for i in range(group)]
        if batches and (len(batches[-1]) + group) * int(np.max(np.asarray(lengths)[batches[-1]])) <= batch_tokens:
            batches[-1] += members
        else:
            batches.append(members)
    return batches


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Positions packed into bins of at most ``capacity`` tokens: the longest first, each into the fullest bin it fits."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in np.argsort(-np.asarray(lengths), kind="stable"):
        need = int(lengths[index])
        at = bisect.bisect_left(room, (need, -1))
        if at < len(room):
            free, number = room.pop(at)
            bins[number].append(int(index))
        else:
            free, number = capacity, len(bins)
            bins.append([int(index)])
        if free - need > 0:
            bisect.insort(room, (free - need, number))
    return bins


def cut_batches(lengths: np.ndarray, batch_tokens: int, packed: bool, group: int = 1) -> list[list[list[int]]]:
    """Batches of rows of positions, largest first: all of a batch packed into one row, or one position a row.

    ``group`` neighbouring positions (a pair) stay together where rows are apart; packing knows no groups.
    """
    if packed:
        return [[row] for row in best_fit_decreasing(lengths, max(batch_tokens, int(lengths.max(initial=0))))]
    return [[[position] for position in batch] for batch in length_sorted(lengths, batch_tokens, group)]


@dataclass
class Plan:
    """Which rows every optimiser step trains: a pure function of its fields and the step, so resuming needs only the step."""

    rows: int  # rows of the table
    batch_size: int  # rows per optimiser step, over all processes
    steps: int  # optimiser steps of the whole run
    seed: int
    part: np.ndarray | None = field(default=None, compare=False, repr=False)  # (rows,) lower ones first in an epoch
    begin: list[np.ndarray] = field(default_factory=list, compare=False, repr=False)  # rows of the first passes

    @classmethod
    def of(
        cls,
        rows: int,
        batch_size: int,
        epochs: float,
        max_steps: int | None,
        seed: int,
        part: np.ndarray | None = None,
        begin: list[np.ndarray] | None = None,
    ) -> Plan:
        begin = begin or []
        # a pass that leaves rows out is an epoch all the same
        left_out = sum((rows - len(order)) * min(1.0, max(0.0, epochs - at)) for at, order in enumerate(begin))
        drawn = rows * epochs - left_out
        steps = max_steps or max(1, math.ceil(drawn / batch_size - 1e-9))  # 30 * 0.1 is 3.0000000000000004
        return cls(rows, batch_size, steps, seed, part, begin)

    def step(self, number: int) -> np.ndarray:
        """Row positions of optimiser step ``number``; epochs follow each other without a seam, each in its own order."""
        first = number * self.batch_size
        wanted = np.arange(first, first + self.batch_size)
        ends = np.cumsum([0, *map(len, self.begin)])
        begun = np.searchsorted(ends, wanted, side="right") - 1  # which of the first passes, where it is one
        later, place = np.divmod(wanted - ends[-1], self.rows)
        early = wanted < ends[-1]
        epochs = np.where(early, begun, len(self.begin) + later)
        places = np.where(early, wanted - ends[begun], place)
        return np.concatenate([self._order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch < len(self.begin):
            return self.begin[epoch]
        if getattr(self, "_cached", (None, None))[0] != epoch:
            drawn = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
            if self.part is not None:
                drawn = drawn[np.argsort(self.part[drawn], kind="stable")]
            self._cached = (epoch, drawn)
        return self._cached[1]


def micro_batches(
    table: TokenTable,
    rows: np.ndarray,
    batch_tokens: int,
    packing: bool,
    pad_id: int,
    lengths: np.ndarray | None = None,
) -> Iterator[Batch]:
    """The micro-batches of one optimiser step, the largest first: what does not fit fails at once, not after an hour.

    ``lengths``: inputs of every sequence of the table, where a token policy adds some; (sequences,).
    """
    per = table.sequences_per_row
    sequences = (np.asarray(rows)[:, None] * per + np.arange(per)).reshape(-1)
    lengths = np.asarray(table.lengths if lengths is None else lengths)[sequences]
    for batch in cut_batches(lengths, batch_tokens, packing, per):
        yield collate(table, [[int(sequences[i]) for i in row] for row in batch], pad_id)
