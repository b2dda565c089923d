"""A tiny model, a table of chat-like sequences, and a context that works alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftrun.config.settings import ModelConfig, Settings
from ftrun.context import Context
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.models.bundle import Bundle
from ftrun.models.load import load_bundle
from ftrun.training.progress import Reporter


class Alone:
    rank, world_size, device = 0, 1, torch.device("cpu")

    def barrier(self) -> None:
        return

    def gather_object(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture
def bundle(tiny_dir: Path) -> Bundle:
    return load_bundle(ModelConfig(path=str(tiny_dir)), task="causal")


@pytest.fixture
def table() -> TokenTable:
    """Twelve sequences: a prompt without weight, then a response; the last one has two responses."""
    random = np.random.default_rng(1)
    made = []
    for number in range(12):
        prompt, response = random.integers(2, 6), random.integers(3, 20)
        weight = np.concatenate([np.zeros(prompt), np.ones(response)]).astype(np.float32)
        if number == 11:
            weight[prompt + 1] = 0
        made.append(Sequence(random.integers(10, 300, prompt + response).astype(np.int32), weight, 100 + number))
    return TokenTable.from_sequences(made)


@pytest.fixture
def context(tmp_path, tiny_dir, bundle) -> Callable[..., Context]:
    def make(tokens: str = "none", knobs: dict[str, Any] | None = None) -> Context:
        slots: dict[str, tuple[str, dict[str, Any]]] = {"tokens": (tokens, knobs or {}), "quant": ("none", {})}
        settings = Settings(slots=slots, model=ModelConfig(path=str(tiny_dir)))
        team: Any = Alone()
        return Context(settings, tmp_path / "run", team, Reporter(stream=io.StringIO(), live=False), bundle=bundle)

    return make
