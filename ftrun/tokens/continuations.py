"""Greedy continuations of many beginnings by the run's model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ftrun.data.batches import cut_batches
from ftrun.data.render import Renderer
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ComponentError
from ftrun.models.generation import Writer, stop_ids
from ftrun.training.scoring import Scoring

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

PROBE_TOKENS = 9  # generated to say how long it will take


@dataclass
class Continuations:
    """Writes on with the most likely token, in large batches sorted by length and dealt to the processes.

    Finished ones lie below selection/token_shards until ``engine.discard``, named after the model and their beginning.
    Raises ComponentError where no model is loaded.
    """

    ctx: Context
    max_new_tokens: int  # a continuation that has not ended by then is cut
    batch_tokens: int  # tokens of the beginnings in a batch

    @cached_property
    def bundle(self) -> Bundle:
        if self.ctx.bundle is None:
            raise ComponentError("this method lets the run's model write, and no model is loaded")
        return self.ctx.bundle

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.bundle.tokenizer)

    @cached_property
    def stops(self) -> list[int]:
        return stop_ids(self.bundle, self.renderer)

    @cached_property
    def engine(self) -> Scoring:
        shards = self.ctx.out / "selection" / "token_shards"
        return Scoring(lambda: self.bundle, self.ctx.team, self.ctx.report, self.batch_tokens, shards)

    def write(self, starts: list[list[int]], title: str) -> list[list[int]]:
        """The new tokens of every beginning (token ids), up to and with the one that ends it.

        A beginning that leaves no room for ``max_new_tokens`` in the context gets none.
        """
        writer = Writer(max_new_tokens=self.max_new_tokens)

        def measure(bundle: Bundle, batch: Batch) -> list[np.ndarray]:
            asked = [batch.input_ids[row][real].tolist() for row, real in enumerate(batch.sequence >= 0)]
            return [np.array(ids) for ids in writer.generate(bundle, asked, self.stops, self.ctx.seed)]

        made = [
            Sequence(np.array(ids, np.int32), np.ones(len(ids), np.float32), number)
            for number, ids in enumerate(starts)
            if self.fits(ids)
        ]
        name = f"greedy-{self.max_new_tokens}"
        written = iter(self.engine.measure(TokenTable.from_sequences(made), name, measure, title))
        return [[int(token) for token in next(written)] if self.fits(ids) else [] for ids in starts]

    def fits(self, start: list[int]) -> bool:
        return len(start) + self.max_new_tokens <= self.bundle.context_length

    def ended(self, ids: list[int]) -> bool:
        """Whether an answer (token ids) came to its end."""
        return bool(ids) and ids[-1] in self.stops

    def text(self, ids: list[int]) -> str:
        words = [token for token in ids if token not in self.stops]
        return self.bundle.tokenizer.decode(words, skip_special_tokens=True).strip()

    def minutes(self, starts: list[list[int]], new_tokens: float) -> float:
        """How long it takes to write ``new_tokens`` behind each, by a trial of a few tokens with a middling batch."""
        batches = cut_batches(np.array([len(start) for start in starts]), self.batch_tokens, packed=False)
        middle = [starts[position] for [position] in batches[len(batches) // 2]]
        seconds = []
        for count in (1, PROBE_TOKENS):
            begun = time.perf_counter()
            Writer(max_new_tokens=count).generate(self.bundle, middle, [], self.ctx.seed)
            seconds.append(time.perf_counter() - begun)
        a_token = (seconds[1] - seconds[0]) / (PROBE_TOKENS - 1)
        return len(batches) * (seconds[0] + (new_tokens - 1) * a_token) / self.ctx.team.world_size / 60
