"""Growth by choice: a chat model says which row to add."""

from __future__ import annotations

import re
import string
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.errors import ComponentError, ConfigError
from ftrun.registry import register
from ftrun.runs.artifacts import digest
from ftrun.select.base import Budget, Picker, Table
from ftrun.select.row_numbers import row_numbers
from ftrun.select.trials.chooser import Answers, Chooser, LocalChooser, RemoteChooser

if TYPE_CHECKING:
    from ftrun.training.context import Context

QUESTION = """\
A training set for a language model is being built row by row. Each row is one line: a request and its response.

Rows in the set so far:
{shown}

Candidates:
{options}

Which single candidate, added to the set, improves it most in the quality of its responses and in its diversity? \
Start your answer with the letter of that candidate in brackets, such as [[A]], and then give your reasons."""
BRACKETED = re.compile(r"\[\[?\s*([A-Za-z])\s*\]")  # answers come in single and in double brackets
LETTERS = string.ascii_uppercase


@register("picker", "add_one_in")
@dataclass
class AddOneIn(Picker):
    """A model adds one row at a time to a growing set (Li et al., 2025, "Add-One-In", arXiv:2503.02359).

    The pool is dealt to shards that grow apart. Each starts with ``shown`` random rows; then ``shown`` rows of its set
    and ``options`` of the rest are drawn and put to the chooser, which names the row that improves the set most. That
    row joins. After an answer that names none of them, rows are drawn anew. Scores play no part beyond the filter.
    """

    shown: int = 10  # rows of the growing set in a question, and random rows at the start (a_w)
    options: int = 10  # rows to choose from in a question (b_w), at most 26
    shards: int = 4  # parts of the pool that grow apart; fewer where the budget is small
    row_length: int = 1000  # characters of a row that a question shows
    chooser_url: str | None = None  # OpenAI-compatible address; null: the scoring model. Its key: FTRUN_CHOOSER_KEY
    chooser_model: str | None = None  # name of the model at chooser_url
    answer: Literal["generate", "letter"] = "generate"  # local chooser: writes an answer, or takes the likeliest letter
    max_new_tokens: int = 1024  # longest answer, in tokens
    timeout: float = 120.0  # seconds to wait for an answer from chooser_url
    retries: int = 20  # invalid answers in a row that it bears; one more, and it gives up

    needs_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("shown", "options", "shards", "row_length", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"select.picker.{name} must be at least 1", f"select.picker.{name}={getattr(self, name)}"
                )
        if self.options > len(LETTERS):
            raise ConfigError(
                "options are labelled with single letters", f"select.picker.options={self.options}", "Use 26 or fewer."
            )
        if self.retries < 0 or not self.timeout > 0:
            raise ConfigError(
                "the timeout is above 0, and retries are not negative",
                f"select.picker.timeout={self.timeout:g} select.picker.retries={self.retries}",
            )
        if self.chooser_url and not self.chooser_model:
            raise ConfigError("the chooser's model has no name", todo="Set select.picker.chooser_model=...")

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        assert table.pool is not None
        numbers = row_numbers(table.pool, ctx.seed, "add_one_in")
        # by content, not by id: the choice may not depend on the order of the pool
        order = candidates[np.argsort(numbers[candidates], kind="stable")]
        count = self._shards(order, table.lengths, budget, ctx)
        records = list(table.pool)
        lines = {place: one_line(records[place].texts, self.row_length) for place in order.tolist()}
        cut = sum(line.endswith("…") for line in lines.values())
        if cut:
            ctx.report.note(f"questions show {cut} of {len(lines)} rows by their first {self.row_length} characters")
        growing = [
            Shard(order[number::count].tolist(), lines, self, np.random.default_rng([ctx.seed, number]))
            for number in range(count)
        ]
        with ctx.report.task("ask the chooser", None, unit="answers") as task:
            answers = Answers(self._chooser(ctx), self._answers_file(ctx), task)
            self._grow(growing, table.lengths, budget, answers, ctx)
        mine = {n: growing[n].chosen for n in range(ctx.team.rank, count, ctx.team.world_size)}
        parts = ctx.team.gather_object((mine, sum(shard.asked for shard in growing), sum(s.invalid for s in growing)))
        asked, invalid = sum(part[1] for part in parts), sum(part[2] for part in parts)
        ctx.facts["chooser"] = {"answers": asked, "invalid": invalid}
        ctx.report.note(f"the chooser gave {asked} answers, {invalid} of them invalid ({invalid / max(asked, 1):.1%})")
        sets = {number: chosen for part in parts for number, chosen in part[0].items()}
        return budget.take(in_turn([sets[number] for number in range(count)]), table.lengths)

    def _shards(self, order: np.ndarray, lengths: np.ndarray, budget: Budget, ctx: Context) -> int:
        """Shards that leave the chooser at least half of each. Raises ConfigError where the seeds alone fill the budget."""
        rows = len(budget.take(order, lengths))
        if rows <= self.shown and rows < len(order):
            raise ConfigError(
                f"the budget holds about {rows} rows, and {self.shown} are drawn at random before the first choice",
                f"select.picker.shown={self.shown}",
                "Raise the budget, or lower select.picker.shown.",
            )
        count = max(1, min(self.shards, rows // (2 * self.shown)))
        if count < self.shards:
            ctx.report.note(
                f"{count} shard(s) instead of {self.shards}: more would draw over half of the rows at random"
            )
        return count

    def _chooser(self, ctx: Context) -> Chooser:
        if self.chooser_url is None:
            return LocalChooser(ctx.scorer, self.max_new_tokens, self.answer)
        return RemoteChooser(self.chooser_url, self.chooser_model or "", self.max_new_tokens, self.timeout)

    def _answers_file(self, ctx: Context) -> Path | None:
        """Where this process keeps its answers, so that a run that was killed does not ask again."""
        if ctx.scorer.shards is None:
            return None
        model = self.chooser_model if self.chooser_url else ctx.scorer.bundle.fingerprint
        name = digest([self.chooser_url, model, self.answer, self.max_new_tokens])
        return ctx.scorer.shards / f"answers-{name}-{ctx.team.rank}.jsonl"

    def _grow(self, growing: list[Shard], lengths: np.ndarray, budget: Budget, answers: Answers, ctx: Context) -> None:
        """Grow this process's shards to their shares of the budget; with a remote chooser side by side."""
        stop = threading.Event()

        def work(number: int) -> None:
            try:
                while not stop.is_set() and not growing[number].full(number, len(growing), budget, lengths):
                    growing[number].step(answers)
            except BaseException:
                stop.set()
                raise

        mine = range(ctx.team.rank, len(growing), ctx.team.world_size)
        with ThreadPoolExecutor(len(growing) if self.chooser_url else 1) as side_by_side:
            for done in [side_by_side.submit(work, number) for number in mine]:
                done.result()


class Shard:
    """Part of the pool: the rows ``chosen`` so far, in order, and the ``rest``."""

    def __init__(self, rows: list[int], lines: dict[int, str], knobs: AddOneIn, draw: np.random.Generator):
        self.lines, self.knobs, self.draw = lines, knobs, draw
        self.chosen, self.rest = rows[: knobs.shown], rows[knobs.shown :]  # rows come in random order
        self.asked = self.invalid = 0  # answers
        self.failed = 0  # invalid answers in a row

    def full(self, number: int, shards: int, budget: Budget, lengths: np.ndarray) -> bool:
        """Whether the shard holds its share of the budget, or everything."""
        if budget.tokens is not None:
            return not self.rest or int(lengths[self.chosen].sum()) * shards >= budget.tokens
        assert budget.rows is not None
        return not self.rest or len(self.chosen) >= budget.rows // shards + (number < budget.rows % shards)

    def step(self, answers: Answers) -> None:
        """Ask once; a valid answer moves one row. Raises ComponentError after too many invalid ones in a row."""
        shown, offered = self._drawn(self.chosen, self.knobs.shown), self._drawn(self.rest, self.knobs.options)
        letters = list(LETTERS[: len(offered)])
        question = QUESTION.format(
            shown="\n".join(f"{n}. {self.lines[row]}" for n, row in enumerate(shown, 1)),
            options="\n".join(f"[{letter}] {self.lines[row]}" for letter, row in zip(letters, offered, strict=True)),
        )
        answer = answers.of(question, letters)
        self.asked += 1
        choice = chosen_option(answer, len(offered))
        if choice is not None:
            self.rest.remove(offered[choice])
            self.chosen.append(offered[choice])
            self.failed = 0
            return
        self.invalid += 1
        self.failed += 1
        if self.failed > self.knobs.retries:
            raise ComponentError(
                f"the chooser named none of its options {self.failed} times in a row",
                f"its last answer: {one_line([answer], 200)!r}",
                "Use a stronger model (select.picker.chooser_url=... or select.model.path=...), or the likeliest letter of "
                "the local one: select.picker.answer=letter.",
            )

    def _drawn(self, rows: list[int], count: int) -> list[int]:
        places = self.draw.permutation(len(rows))[:count]
        return [rows[place] for place in places.tolist()]


def chosen_option(answer: str, options: int) -> int | None:
    """Number of the option that the first bracketed letter names, from 0; None without one, or beyond the options."""
    found = BRACKETED.search(answer)
    place = LETTERS.index(found[1].upper()) if found else options
    return place if place < options else None


def one_line(texts: list[str], longest: int) -> str:
    """The texts on one line, cut after ``longest`` characters and then ending in "…"."""
    line = " ".join(" ".join(texts).split())
    return line if len(line) <= longest else line[:longest] + "…"


def in_turn(sets: list[list[int]]) -> np.ndarray:
    """The first of each list, then the second of each, and so on."""
    longest = max(map(len, sets), default=0)
    dealt = [chosen[turn] for turn in range(longest) for chosen in sets if turn < len(chosen)]
    return np.array(dealt, np.int64)
