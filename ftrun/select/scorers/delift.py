"""Selection by how much rows help with each other as in-context examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Scorer
from ftrun.select.geometry.submodular import FacilityLocation, lazy_greedy
from ftrun.select.queries import load_queries, load_rows
from ftrun.select.row_numbers import row_numbers
from ftrun.select.scoring.texts import Turns, read_turns
from ftrun.select.trials.incontext import Pace, blocks, engine_for, say_cost, timed
from ftrun.training.scoring import Scoring, segments

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.select.queries import Queries
    from ftrun.training.context import Context


@register("select", "delift")
@dataclass
class Delift(Scorer):
    """Rows that together help most with the others (Agarwal et al., 2025, "DELIFT", arXiv:2411.04425).

    d(i) = ||1 - p|| / sqrt(tokens), p being the probabilities of the tokens of row i's response and its end; d(i | j) the
    same with row j in front as the one example. U[i, j] = d(i) - d(i | j), scaled to [0, 1] over the whole matrix.
    Rows are taken greedily by what they add to

        sum_i max_j U[i, j]                                             over the chosen j; rows are examples and tasks
        sum_i min(max_j U[i, j], eta max_q U[i, q])                     with target rows q: select.queries
        sum_i max(max_j U[i, j] - nu max_p U[i, p], 0)                  with old rows p: select.old

    The score of a row is what it adds to those taken before it. The cost is rows x rows forward passes: ``sample`` and
    ``evaluated`` bound it.
    """

    sample: int | None = 1000  # rows that can be chosen, drawn by content; null: all
    evaluated: int | None = None  # rows that examples are tried on, drawn from those; null: all of them
    others: int | None = 100  # target or old rows that are tried as examples, drawn by content; null: all
    old: str | None = None  # file of rows that the model was trained on before, laid out as the pool is
    eta: float = 1.0  # how far beyond what target rows help a row may help
    nu: float = 1.0  # how much of what old rows help counts as known
    template: Literal["plain", "alpaca", "chat"] = "plain"  # layout of the prompt; plain: lines without any markup
    max_length: int = 2048  # tokens of example, prompt and response; a longer example is cut at its end

    column: ClassVar[str] = "delift"

    def __post_init__(self) -> None:
        for name in ("sample", "evaluated", "others", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"select.{name} must be at least 1", f"select.{name}={value}")
        for name in ("eta", "nu"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"select.{name} must not be negative", f"select.{name}={getattr(self, name)}")

    def files(self) -> list[str]:
        return [self.old] if self.old else []

    def planned_tokens(self, lengths: np.ndarray) -> float:
        chosen = min(self.sample or len(lengths), len(lengths))
        tasks = min(self.evaluated or chosen, chosen)
        return float(tasks * chosen * 2 * lengths.mean())

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Gain along the greedy order and mean utility as an example, (rows,); NaN outside the sample."""
        others = self._others(ctx)
        turns = read_turns(pool, ctx, self.template)
        pairs = Pairs(turns, len(pool), ctx, self.max_length)
        columns = {name: np.full(len(pool), np.nan) for name in ("delift", "utility")}
        chosen = self._sampled(pairs, pool, ctx)
        if not len(chosen):
            return columns
        tasks = _drawn(chosen, row_numbers(pool, ctx.seed, "delift tasks"), self.evaluated)
        examples = [pairs.example(row) for row in chosen.tolist()]
        extra = self._examples_of(others, ctx) if others else []
        raw = pairs.utility(tasks, [*examples, *extra])
        scaled = min_max(raw)
        utility, beside = scaled[:, : len(examples)], scaled[:, len(examples) :]
        if others:
            reach = beside.max(axis=1, keepdims=True)
            utility = np.maximum(utility - self.nu * reach, 0) if self.old else np.minimum(utility, self.eta * reach)
        order = list(lazy_greedy(FacilityLocation(utility), np.arange(len(chosen))))
        for place, gain in order:
            columns["delift"][chosen[place]] = gain
        columns["utility"][chosen] = raw[:, : len(examples)].mean(axis=0)
        useful = sum(gain > 0 for _, gain in order)
        if useful < len(order):
            ctx.report.note(
                f"{useful} rows reach all that can be reached: the others add nothing and follow by their ids"
            )
        return columns

    def _others(self, ctx: Context) -> Queries | None:
        """Target rows or old rows, where there are any."""
        targets = ctx.settings.select.queries
        if self.old and targets:
            raise ConfigError(
                "delift looks for rows near your queries, or for rows beyond the old ones, not for both",
                f"select.old={self.old} select.queries={targets}",
                "Leave one of them out.",
            )
        if self.old:
            return load_rows(ctx.settings, [self.old])
        return load_queries(ctx.settings) if targets else None

    def _examples_of(self, others: Queries, ctx: Context) -> list[list[int]]:
        """The target or old rows as examples: the first ``others`` by a number that follows from their content."""
        numbers = np.concatenate([row_numbers(pool, ctx.seed, "delift others") for pool in others.pools])
        pairs = Pairs(read_turns(others, ctx, self.template), len(others), ctx, self.max_length)
        known = np.array(sorted(set(pairs.turns.row.tolist())), np.int64)
        drawn = _drawn(known, numbers, self.others)
        if not len(drawn):
            raise ConfigError("none of these rows has a response", f"select.queries or select.old: {len(others)} rows")
        if len(drawn) < len(known):
            ctx.report.note(f"{len(drawn)} of {len(known)} target or old rows are tried as examples (select.others)")
        return [pairs.example(row) for row in drawn.tolist()]

    def _sampled(self, pairs: Pairs, pool: Pool, ctx: Context) -> np.ndarray:
        """Places of the rows that can be chosen, in order; the others get a reason."""
        reasons = ctx.scorer.reasons
        usable = pairs.usable(reasons)
        chosen = _drawn(usable, row_numbers(pool, ctx.seed, "delift"), self.sample)
        for row in np.setdiff1d(usable, chosen).tolist():
            reasons[row] = f"not among the {self.sample} rows drawn (select.sample)"
        if len(chosen) < len(usable):
            ctx.report.note(f"{len(chosen):,} of {len(usable):,} rows are drawn to choose from (select.sample)")
        return chosen


class Pairs:
    """Prompts of one example and one task. ``turns`` are those of ``rows`` rows."""

    def __init__(self, turns: Turns, rows: int, ctx: Context, max_length: int):
        self.turns, self.rows, self.ctx = turns, rows, ctx
        self.limit = min(max_length, ctx.scorer.bundle.context_length)
        end = ctx.scorer.tokenizer.eos_token_id
        self.end = [] if end is None else [end]
        self.last = dict(zip(turns.row.tolist(), range(len(turns.row)), strict=True))  # row -> its last turn

    def example(self, row: int) -> list[int]:
        """The whole row: prompt, end, response, end."""
        turn = self.last[row]
        return [*self.turns.prompt[turn], *self.end, *self.turns.response[turn], *self.end]

    def usable(self, reasons: dict[int, str]) -> np.ndarray:
        """Rows whose every turn fits into the limit by itself; the others get a reason."""
        found = np.zeros(self.rows, bool)
        found[self.turns.row] = True
        for row in np.flatnonzero(~found).tolist():
            reasons[row] = "no response"
        for turn, row in enumerate(self.turns.row.tolist()):
            if sum(map(len, self._task(turn))) > self.limit:
                found[row] = False
                reasons[row] = f"prompt and response are longer than {self.limit} tokens"
        return np.flatnonzero(found)

    def utility(self, tasks: np.ndarray, examples: list[list[int]]) -> np.ndarray:
        """d(i) - d(i | j), (tasks, examples), before scaling. Says how long it takes before it starts."""
        turns = np.flatnonzero(np.isin(self.turns.row, tasks))
        place = np.searchsorted(tasks, self.turns.row[turns])  # both ascend
        own = sum(sum(map(len, self._task(turn))) for turn in turns.tolist())
        engine = engine_for(self.ctx, "alone")
        with timed(engine, len(turns), own) as pace:
            alone = self._distances(engine, turns.tolist(), [[]])[0]
        self._announce(turns, examples, pace)
        result = np.empty((len(tasks), len(examples)))
        count = np.bincount(place, minlength=len(tasks))
        for first, distances in self._in_blocks(turns.tolist(), examples):
            for number, given in enumerate(distances, first):
                result[:, number] = np.bincount(place, weights=alone - given, minlength=len(tasks)) / count
        return result

    def _in_blocks(self, turns: list[int], examples: list[list[int]]) -> Iterator[tuple[int, np.ndarray]]:
        """Distances given some of the examples at a time, which bounds the memory: first example, (examples, turns)."""
        own = sum(sum(map(len, self._task(turn))) for turn in turns)
        for start, end in blocks([own + len(example) * len(turns) for example in examples]):
            title = f"try examples {start + 1:,} to {end:,} of {len(examples):,}"
            yield start, self._distances(engine_for(self.ctx, examples[start:end]), turns, examples[start:end], title)

    def _distances(
        self, engine: Scoring, turns: list[int], examples: list[list[int]], title: str = "score rows without an example"
    ) -> np.ndarray:
        """d of these turns given each of the examples, (examples, turns)."""
        texts = []
        for example in examples:
            for turn in turns:
                prompt, middle, response = self._task(turn)
                room = self.limit - len(prompt) - len(middle) - len(response)
                texts.append(([*example[:room], *prompt], middle, response))
        asked = segments(([*context, *middle], response) for context, middle, response in texts)
        nll = engine.token_nll(asked, title).astype(np.float64)
        missed = (1 - np.exp(-nll)) ** 2
        known = ~np.isnan(nll)
        owner = np.repeat(np.arange(len(texts)), asked.lengths)[known]
        total = np.bincount(owner, weights=missed[known], minlength=len(texts))
        count = np.bincount(owner, minlength=len(texts))
        mean = np.divide(total, count, out=np.zeros(len(texts)), where=count > 0)
        return np.sqrt(mean).reshape(len(examples), len(turns))

    def _task(self, turn: int) -> tuple[list[int], list[int], list[int]]:
        """Prompt, what ends it, and the scored tokens: response and end."""
        return self.turns.prompt[turn], self.end, [*self.turns.response[turn], *self.end]

    def _announce(self, turns: np.ndarray, examples: list[list[int]], pace: Pace) -> None:
        own = np.array([sum(map(len, self._task(turn))) for turn in turns.tolist()])
        whole = np.array([len(example) for example in examples])[:, None] + own[None, :]
        what = f"{len(turns):,} tasks x {len(examples):,} examples"
        tokens = int(np.minimum(whole, self.limit).sum())
        say_cost(self.ctx, what, whole.size, tokens, pace, "select.sample and select.evaluated make them fewer")
        if cut := int((whole > self.limit).sum()):
            self.ctx.report.note(
                f"in {cut:,} of them the end of the example is cut off: longer than {self.limit} tokens"
            )


def min_max(values: np.ndarray) -> np.ndarray:
    """Scaled to [0, 1] as a whole; all 0 where nothing differs."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _drawn(rows: np.ndarray, numbers: np.ndarray, count: int | None) -> np.ndarray:
    """The ``count`` rows with the lowest numbers, in order of the rows."""
    if count is None or len(rows) <= count:
        return rows
    return np.sort(rows[np.argsort(numbers[rows], kind="stable")[:count]])
