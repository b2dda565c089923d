"""A context for selection: a tiny model, a pool of rows, one process or several threads that act as processes."""

from __future__ import annotations

import copy
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftrun.config.settings import DataConfig, SelectConfig, Settings
from ftrun.data.pool import Pool, load_pool
from ftrun.models.architecture import describe
from ftrun.models.bundle import Bundle
from ftrun.runs.progress import Reporter
from ftrun.training.context import Context
from ftrun.training.scoring import Scoring


class Alone:
    """One process."""

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


class Threads:
    """A process of several, played by a thread."""

    device = torch.device("cpu")

    def __init__(self, rank: int, shared: list[Any], meeting: threading.Barrier):
        self.rank, self.world_size, self.shared, self.meeting = rank, len(shared), shared, meeting

    def barrier(self) -> None:
        self.meeting.wait(60)

    def gather_object(self, value: Any) -> list[Any]:
        self.shared[self.rank] = value
        self.barrier()
        gathered = list(self.shared)
        self.barrier()
        return gathered


@pytest.fixture
def together() -> Callable[[int, Callable[[Threads], Any]], list[Any]]:
    """Runs some work as several processes, and gives what each of them returns."""

    def start(processes: int, work: Callable[[Threads], Any]) -> list[Any]:
        shared: list[Any] = [None] * processes
        meeting, results = threading.Barrier(processes), [None] * processes

        def run(rank: int) -> None:
            try:
                results[rank] = work(Threads(rank, shared, meeting))
            except BaseException:
                meeting.abort()
                raise

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return results

    return start


@pytest.fixture(scope="session")
def loaded(tiny_dir: Path) -> Bundle:
    """The tiny model, to be copied: that is much quicker than loading."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    return Bundle(model, tokenizer, describe(model), torch.device("cpu"), torch.float32, str(tiny_dir), "tiny", 512)


@pytest.fixture
def bundle(loaded: Bundle) -> Bundle:
    return copy.deepcopy(loaded)


@pytest.fixture
def make_pool(tmp_path) -> Callable[[list[dict[str, Any]]], Pool]:
    made = iter(range(1000))

    def make(rows: list[dict[str, Any]]) -> Pool:
        folder = tmp_path / f"pool{next(made)}"
        folder.mkdir()
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_pool(DataConfig(path=str(file)), folder / "work", seed=0)

    return make


@pytest.fixture
def context(tmp_path, bundle) -> Callable[..., Context]:
    def make(
        select: str = "random",
        picker: str = "own",
        knobs: dict[str, Any] | None = None,
        picker_knobs: dict[str, Any] | None = None,
        team: Any = None,
        shared: SelectConfig | None = None,
        **settings: Any,
    ) -> Context:
        slots = {"select": (select, knobs or {}), "picker": (picker, picker_knobs or {})}
        team = team or Alone()
        report = Reporter(rank=team.rank, stream=io.StringIO(), live=False)
        made = Settings(slots=slots, select=shared or SelectConfig(), **settings)
        ctx = Context(made, tmp_path / "run", team, report, bundle=bundle)
        ctx.scoring = Scoring(lambda: bundle, team, report, made.select.batch_tokens)
        return ctx

    return make


@pytest.fixture
def queries(tmp_path):
    """Writes files of queries and gives the shared settings that name them."""

    def write(*tasks: list[dict], **shared) -> SelectConfig:
        files = []
        for number, rows in enumerate(tasks):
            file = tmp_path / f"queries{number}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files.append(str(file))
        return SelectConfig(queries=files, **shared)

    return write


@pytest.fixture
def plain_nll() -> Callable[[Bundle, list[int]], np.ndarray]:
    """Losses of tokens 1.. of one text, by the model's own forward at batch size 1."""

    def losses(bundle: Bundle, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = bundle.model(torch.tensor([ids])).logits[0, :-1].double()
        picked = torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        return -picked.numpy()

    return losses
