"""Batches as a token policy may arrange them: targets, attention and added inputs of its own."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ftrun.data.batches import Batch, Targets, collate, micro_batches
from ftrun.data.tokens import Sequence, TokenTable


@pytest.fixture
def table() -> TokenTable:
    made = []
    for record, (prompt, response) in enumerate([(3, 4), (2, 6), (5, 1)]):
        weight = np.concatenate([np.zeros(prompt), np.full(response, 0.5 + record)]).astype(np.float32)
        made.append(Sequence(np.arange(10 * record, 10 * record + prompt + response).astype(np.int32), weight, record))
    found = TokenTable.from_sequences(made)
    return found.with_remembered({"number": np.arange(len(found.input_ids))})


def some_targets(batch: Batch) -> Targets:
    """The second half of the batch's own targets."""
    half = batch.trained_tokens // 2
    return Targets(*(getattr(batch.targets, part.name)[half:] for part in fields(Targets)))


@pytest.mark.parametrize("groups", [[[0], [1], [2]], [[0, 1], [2]]], ids=["apart", "packed"])
def test_targets_follow_from_the_weights(groups, table):
    batch = collate(table, groups, 99)
    row, before = batch.predicting
    assert torch.equal(batch.target_ids, batch.input_ids[row, before + 1])
    assert torch.equal(batch.target_weights, batch.loss_weight[row, before + 1])
    assert torch.equal(batch.target_sequence, batch.sequence[row, before])
    assert batch.target_ids.tolist() == [3, 4, 5, 6, 12, 13, 14, 15, 16, 17, 25]
    assert batch.trained_tokens == 11 and batch.tokens == 21
    assert batch.remembered_targets("number").tolist() == [3, 4, 5, 6, 9, 10, 11, 12, 13, 14, 20]


def test_own_targets_take_the_place_of_the_inputs(table):
    """Everything about targets is read from them; the inputs may be others."""
    batch = collate(table, [[0], [1], [2]], 99)
    _ = batch.targets  # what was computed before must not stay
    own = some_targets(batch)
    arranged = replace(batch, input_ids=torch.zeros_like(batch.input_ids), own_targets=own)
    assert arranged.targets is own
    assert torch.equal(arranged.target_ids, batch.target_ids[5:])
    assert torch.equal(arranged.target_weights, batch.target_weights[5:])
    assert torch.equal(arranged.target_sequence, batch.target_sequence[5:])
    assert arranged.trained_tokens == 6 and arranged.tokens == batch.tokens
    assert [part.tolist() for part in arranged.predicting] == [own.row.tolist(), own.position.tolist()]


def test_changed_inputs_keep_the_targets(table):
    batch = collate(table, [[0], [1], [2]], 99)
    arranged = replace(batch, input_ids=torch.zeros_like(batch.input_ids), own_targets=batch.targets)
    assert torch.equal(arranged.target_ids, batch.target_ids)
    assert torch.equal(arranged.remembered_targets("number"), batch.remembered_targets("number"))


def test_added_inputs_are_no_tokens_of_the_data(table):
    batch = collate(table, [[0], [1], [2]], 99)
    added = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    added[:, 1] = True
    assert replace(batch, added=added).tokens == batch.tokens - 3
    added |= batch.sequence < 0  # padding counts as nothing anyway
    assert replace(batch, added=added).tokens == batch.tokens - 3


def test_moving_takes_every_tensor_along(table):
    batch = collate(table, [[0, 1], [2]], 99)
    seen = torch.ones(*batch.input_ids.shape, batch.input_ids.shape[1], dtype=torch.bool)
    batch = replace(batch, own_targets=some_targets(batch), attention=seen, added=batch.sequence < 0)
    moved = batch.to(torch.device("meta"))
    for part in fields(Batch):
        value = getattr(moved, part.name)
        if isinstance(value, Tensor):
            assert value.is_meta, part.name
    assert moved.own_targets is not None
    assert all(getattr(moved.own_targets, part.name).is_meta for part in fields(Targets))
    assert moved.remembered["number"].is_meta
    assert (moved.sequences, moved.packed, moved.rows) == (batch.sequences, batch.packed, batch.rows)
    assert batch.to(torch.device("cpu")) is batch


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_are_cut_by_the_inputs_that_they_will_have(packing, table):
    """Seven, eight and six tokens: two rows in sixteen, but not when each doubles."""
    rows = np.arange(3)
    plain = [batch.sequences for batch in micro_batches(table, rows, 16, packing, 99)]
    longer = [batch.sequences for batch in micro_batches(table, rows, 16, packing, 99, np.asarray(table.lengths) * 2)]
    assert sorted(plain) == [1, 2] and longer == [1, 1, 1]
