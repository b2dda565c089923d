"""A tiny model, a table of chat-like sequences, and a context that works alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftrun.config.settings import ModelConfig, Settings
from ftrun.data.batches import micro_batches
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.models.bundle import Bundle
from ftrun.models.load import load_bundle
from ftrun.runs.progress import Reporter
from ftrun.tokens.base import TokenPolicy
from ftrun.training.context import Context
from ftrun.training.view import StepView


class Alone:
    rank, world_size, device, is_main = 0, 1, torch.device("cpu"), True

    def barrier(self) -> None:
        return

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def broadcast_(self, tensors: list[torch.Tensor]) -> None:
        return

    def gather_object(self, value: Any) -> list[Any]:
        return [value]

    splits = True

    def share(self, items: Any) -> Any:
        return items

    def collect(self, made: Any) -> list[Any]:
        return [made]


@pytest.fixture(scope="session")
def loaded(tiny_dir: Path) -> Bundle:
    """The tiny model, to be copied: that is much quicker than loading."""
    return load_bundle(ModelConfig(path=str(tiny_dir)), task="causal")


@pytest.fixture
def bundle(loaded: Bundle) -> Bundle:
    return copy.deepcopy(loaded)


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


@pytest.fixture
def make_views(bundle) -> Callable[..., list[StepView]]:
    """All rows of a table as one optimiser step, cut into micro-batches."""

    def make(table: TokenTable, batch_tokens: int = 64, packing: bool = False, **known: Any) -> list[StepView]:
        batches = micro_batches(table, np.arange(len(table)), batch_tokens, packing, bundle.pad_id)
        return [StepView(bundle.model, bundle.architecture, batch, **known) for batch in batches]

    return make


@pytest.fixture
def factors_of() -> Callable[..., dict[int, np.ndarray]]:
    """Factors of the trained tokens of every row, as the loop asks for them."""

    def ask(policy: TokenPolicy, views: list[StepView]) -> dict[int, np.ndarray]:
        everything = torch.cat([policy.statistic(view) for view in views])
        factors = {}
        for view in views:
            view.step_statistics = everything
            view.factors = policy.weigh(view)
            assert not view.factors.requires_grad and view.factors.dtype == view.token_nll.dtype
            for number, row in enumerate(view.batch.table_index.tolist()):
                factors[row] = view.factors[view.batch.target_sequence == number].numpy()
        return factors

    return ask


@pytest.fixture
def plain_losses(bundle) -> Callable[..., dict[int, np.ndarray]]:
    """Losses of the trained tokens of every row, by a loop at batch size 1 in float64."""

    def losses(table: TokenTable, model: Any = None) -> dict[int, np.ndarray]:
        found = {}
        for row in range(len(table)):
            item = table.sequence(row)
            ids = torch.tensor(item.input_ids.tolist())
            with torch.no_grad():
                logits = (model or bundle.model)(ids[None]).logits[0, :-1].double()
            nll = -torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]].numpy()
            found[row] = nll[item.loss_weight[1:] > 0]
        return found

    return losses
