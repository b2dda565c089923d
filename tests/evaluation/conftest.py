"""A tiny bundle, a context without a run around it, and a team whose processes take turns."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from ftrun.config.settings import Settings
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.models.architecture import describe
from ftrun.models.bundle import Bundle
from ftrun.runs.progress import Reporter
from ftrun.training.context import Context


@dataclass
class Alone:
    """A team of one; or process ``rank`` of several, given what all of them would put into each gathering."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    gathered: list[list[Any]] = field(default_factory=list)
    given: list[Any] = field(default_factory=list)

    def gather_object(self, value: Any) -> list[Any]:
        self.given.append(value)
        if self.world_size == 1:
            return [value]
        return self.gathered[len(self.given) - 1] if self.gathered else [value]

    splits = True

    def at_work(self, where: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def share(self, items: Any) -> Any:
        return items[self.rank :: self.world_size]

    def collect(self, made: Any) -> list[Any]:
        return self.gather_object(made)


@pytest.fixture
def alone():
    return Alone


@pytest.fixture(scope="session")
def bundle(tiny_dir) -> Bundle:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_dir).eval()
    with torch.no_grad():  # a random model of this width says nearly the same everywhere: make it care
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    return Bundle(model, tokenizer, describe(model), torch.device("cpu"), torch.float32, "tiny", "0" * 16, 512)


@pytest.fixture
def context(tmp_path):
    """``context(heldout_tokens=..., team=...)``"""

    def make(team: Any = None, **given: Any) -> Context:
        return Context(Settings(), tmp_path, team or Alone(), Reporter(stream=io.StringIO()), **given)

    return make


@pytest.fixture
def table() -> TokenTable:
    """Twelve sequences of 3 to 40 tokens, half prompt and half response; one of them has no response."""
    generator = np.random.default_rng(0)
    sequences = []
    for row in range(12):
        length = int(generator.integers(3, 41))
        weight = np.zeros(length, np.float32)
        weight[length // 2 :] = 0.0 if row == 5 else generator.uniform(0.5, 2)
        sequences.append(Sequence(generator.integers(4, 250, length).astype(np.int32), weight, 100 + row))
    return TokenTable.from_sequences(sequences)
