"""Packed documents on a CPU: attention runs per document exactly where that changes nothing."""

from __future__ import annotations

import pytest
import torch

from ftrun.data.batches import Batch, collate
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.models import packing, varlen
from ftrun.models.architecture import describe
from ftrun.models.head import token_nll


def packed(lengths: list[int]) -> Batch:
    import numpy as np

    draw = np.random.default_rng(1)
    rows = [
        Sequence(draw.integers(3, 90, size=n).astype(np.int32), np.ones(n, np.float32), i)
        for i, n in enumerate(lengths)
    ]
    return collate(TokenTable.from_sequences(rows), [list(range(len(lengths)))], 0)


@pytest.fixture
def query_lengths(monkeypatch) -> list[int]:
    """Lengths that sdpa was called with."""
    seen: list[int] = []
    plain = varlen.sdpa_attention_forward

    def watched(module, query, *args, **kwargs):
        seen.append(query.shape[2])
        return plain(module, query, *args, **kwargs)

    monkeypatch.setattr(varlen, "sdpa_attention_forward", watched)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "opt", "olmo2", "granite", "cohere", "phi3"])
def test_one_product_a_document(make, family, query_lengths):
    model = make(family, varlen.NAME)
    found, batch = describe(model), packed([4, 1, 7])
    found.hidden_states(model, batch)
    del query_lengths[:]  # the first packed batch also tries whether the model keeps documents apart
    found.hidden_states(model, batch)
    assert query_lengths == [4, 1, 7] * len(found.layers)


def test_a_window_that_cuts_a_document_keeps_its_mask(make, query_lengths):
    """Gemma 3: a window of 8 in the first layer, full attention in the second; the document of 11 tokens is cut."""
    model = make("gemma3_text", varlen.NAME)
    found, batch = describe(model), packed([4, 11])
    found.hidden_states(model, batch)
    del query_lengths[:]
    found.hidden_states(model, batch)
    assert query_lengths == [15, 4, 11]


def test_gradient_checkpointing_recomputes_the_same(make, query_lengths):
    batch = packed([6, 3, 9])
    gradients = []
    for checkpointing in (False, True):
        model = make("llama", varlen.NAME).train()
        found = describe(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        hidden = found.hidden_states(model, batch)[batch.predicting]
        token_nll(hidden, found.head(model), batch.target_ids).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_document_bounds():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 0]])
    assert varlen.document_bounds(positions).tolist() == [0, 3, 4, 6, 7]
    assert varlen.document_bounds(torch.tensor([[0, 1]])).tolist() == [0, 2]


def test_block_diagonal_mask():
    mask = packing.block_diagonal(torch.tensor([[0, 1, 0, 1]]), None)[0, 0]
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    added = packing.block_diagonal(torch.tensor([[0, 1, 0, 1]]), torch.float32)[0, 0]
    assert torch.equal(added == 0, mask) and added.min() == torch.finfo(torch.float32).min


def test_without_packing_it_is_sdpa(make, query_lengths):
    ours, plain = make("llama", varlen.NAME), make("llama", "sdpa")
    ids = packed([12]).input_ids
    assert torch.equal(ours(ids).logits, plain(ids).logits) and query_lengths == [12, 12]
