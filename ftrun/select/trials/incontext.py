"""Parts of methods that try many examples in front of many rows: blocks that bound the memory, and the cost said first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.runs.artifacts import digest
from ftrun.runs.numbers import duration

if TYPE_CHECKING:
    from ftrun.training.context import Context
    from ftrun.training.scoring import Scoring

BLOCK_TOKENS = 2_000_000  # tokens of texts that are made at one time


def blocks(tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and end of groups of neighbours that hold at most BLOCK_TOKENS together, or a single one."""
    start = total = 0
    for place, count in enumerate(tokens):
        if place > start and total + count > BLOCK_TOKENS:
            yield start, place
            start, total = place, 0
        total += count
    if start < len(tokens):
        yield start, len(tokens)


def engine_for(ctx: Context, content: object) -> Scoring:
    """The scoring model in an engine that remembers this block only; what it finishes lies in a folder of its own."""
    engine = ctx.scorer.with_model(lambda: ctx.scorer.bundle)
    if engine.shards is not None:
        engine.shards /= f"block-{digest(content)}"
    return engine


@dataclass
class Pace:
    """Seconds that some first texts took, to tell how long the others will take."""

    engine: Scoring
    texts: int
    tokens: int
    seconds: float = 0.0

    def seconds_for(self, tokens: int) -> float | None:
        """None where all of the first texts were known from an interrupted run."""
        fresh = min(1.0, self.engine.computed * self.engine.team.world_size / max(1, self.texts))
        return self.seconds / (fresh * self.tokens) * tokens if fresh and self.tokens else None


@contextmanager
def timed(engine: Scoring, texts: int, tokens: int) -> Iterator[Pace]:
    """Measure what is scored within it; loading the model does not count."""
    engine.bundle  # noqa: B018
    pace = Pace(engine, texts, tokens)
    started = time.perf_counter()
    yield pace
    pace.seconds = time.perf_counter() - started


def say_cost(ctx: Context, what: str, passes: int, tokens: int, pace: Pace, todo: str) -> None:
    """Tell before it starts how many passes there are, over how many tokens, and about how long they take."""
    seconds = pace.seconds_for(tokens)
    about = "" if seconds is None else f", about {duration(seconds)}"
    ctx.report.note(f"{what} = {passes:,} forward passes over {tokens:,} tokens{about}; {todo}")
