"""A fresh tiny model, a stand-in for the run's context, and one batch."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ftrun.data.batches import collate
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.models.architecture import describe


@pytest.fixture(scope="session")
def table() -> TokenTable:
    """Twelve random sequences of 24 to 40 tokens; the last half of each is trained."""
    random = np.random.default_rng(0)
    sequences = []
    for row in range(12):
        length = int(random.integers(24, 40))
        weight = (np.arange(length) >= length // 2).astype(np.float32)
        sequences.append(Sequence(random.integers(4, 300, length).astype(np.int32), weight, row))
    return TokenTable.from_sequences(sequences)


@pytest.fixture(scope="session")
def batch(table):
    return collate(table, [[row] for row in range(4)], pad_id=3)


@pytest.fixture(scope="session")
def loaded(tiny_dir):
    """The tiny model, to be copied: that is much quicker than loading."""
    return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()


@pytest.fixture
def fresh(tiny_dir, loaded):
    """The tiny model anew; keyword arguments go to from_pretrained."""

    def make(**arguments):
        if not arguments:
            return copy.deepcopy(loaded)
        return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32, **arguments).eval()

    return make


@pytest.fixture
def context(table):
    """A context around a model: what adapters ask of the real one."""

    def make(model, seed=0, task="causal"):
        bundle = SimpleNamespace(model=model, tokenizer=None, architecture=describe(model), device=torch.device("cpu"))

        def calibration(batches):
            return [collate(table, [[(4 * i + j) % 12] for j in range(4)], pad_id=3) for i in range(batches)]

        return SimpleNamespace(
            settings=SimpleNamespace(task=task),
            seed=seed,
            bundle=bundle,
            calibration=calibration,
            planned_steps=lambda: 6,
            team=SimpleNamespace(world_size=1),
        )

    return make


@pytest.fixture
def logits(batch):
    """Logits of the batch's real tokens, without gradient."""

    @torch.no_grad()
    def of(model):
        model.eval()
        predicted = model(input_ids=batch.input_ids, use_cache=False).logits[:, -batch.input_ids.shape[1] :]
        return predicted[batch.sequence >= 0]  # virtual tokens come first

    return of


@pytest.fixture
def loss(batch):
    """Mean loss of the trained tokens."""

    def of(model):
        predicted = model(input_ids=batch.input_ids, use_cache=False).logits[:, -batch.input_ids.shape[1] :]
        predicted = predicted[batch.predicting]
        return torch.nn.functional.cross_entropy(predicted, batch.target_ids)

    return of


@pytest.fixture
def train(loss):
    """Some optimiser steps on the one batch, as the loop takes them; returns the losses."""

    def steps(adapter, model, count=3, rate=1e-2, optimizer=None, first=0):
        if optimizer is None:
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
            adapter.bind(optimizer)
        losses = []
        for step in range(first, first + count):
            torch.manual_seed(step)
            adapter.before_step(step)
            value = loss(model)
            value.backward()
            optimizer.step()
            adapter.after_step(step)
            optimizer.zero_grad(set_to_none=True)
            losses.append(value.item())
        return [*losses, loss(model).item()]

    return steps
