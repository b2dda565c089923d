"""Demonstrations of a task in the prompt, so that learning from them is what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftrun.data.records import Message, Record
from ftrun.errors import ConfigError, DataError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy, edited_row
from ftrun.tokens.demonstrations import Task, draw_rows, filled, generator_of, tasks_of, text_of
from ftrun.tokens.edited import edited_rows

if TYPE_CHECKING:
    from ftrun.data.tokens import TokenTable
    from ftrun.training.context import Context


@register("tokens", "in_context_tuning")
@dataclass
class InContextTuning(TokenPolicy):
    """Tunes on prompts of demonstrations and a query, both of one task (Chen et al., 2022, arXiv:2110.07814).

    Each labelled row is the query of ``draws`` prompts: in a template drawn for it, ``shots`` other rows of its task with
    their labels, then the row without. The answer is its label's word. A batch holds rows of one task; tasks are filled
    up with further prompts to whole batches. With objective=label_words the loss compares the words of the task alone.
    """

    shots: int = 5  # demonstrations in a prompt (n); 0 shows the query alone
    draws: int = 3  # prompts made of each row, with other demonstrations: as many epochs
    other_labels: bool = False  # no demonstration has the query's label
    task: str = "task"  # column that tells the task of a row; rows without it are one task
    words: dict[str, str] = field(default_factory=dict)  # label -> word that stands for it; others stand for themselves
    templates: list[str] = field(
        default_factory=lambda: ["{text}\nLabel: {label}", "Input: {text}\nOutput: {label}"]
    )  # forms of an example; one is drawn for each prompt

    edits: ClassVar[bool] = True
    eats: ClassVar[tuple[str, ...]] = ("labels",)
    edits_heldout: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, number, least in (("shots", self.shots, 0), ("draws", self.draws, 1)):
            if number < least:
                raise ConfigError(f"tokens.{name} must be {least} or more", f"tokens.{name}={number}")
        wrong = [t for t in self.templates if t.count("{text}") != 1 or t.count("{label}") != 1]
        wrong += [t for t in self.templates if t not in wrong and t.index("{label}") < t.index("{text}")]
        if wrong or not self.templates:
            raise ConfigError(
                "a template of tokens.templates holds {text} once and then {label} once", f"tokens.templates={wrong}"
            )

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        heldout = records is ctx.heldout
        whole = 1 if heldout else ctx.settings.train.batch_size
        few = filled_up = 0
        for task in tasks_of(records, self.task):
            count = len(task.rows) * (1 if heldout else self.draws)
            more = -count % whole
            filled_up += more
            for number in range(count + more):
                draw, place = divmod(number, len(task.rows))
                query = task.rows[place]
                row, shown = self.prompt(query, task, generator_of(query, draw, ctx.seed))
                few += shown < self.shots
                yield row
        if few:
            ctx.report.warn(f"{few} prompts have fewer than {self.shots} demonstrations: their task has no more rows")
        if filled_up:
            ctx.report.note(f"{filled_up} further prompts fill the last batch of each task up")

    def prompt(self, query: Record, task: Task, generator: np.random.Generator) -> tuple[dict[str, Any], int]:
        """The row's prompt with its label word as answer, and how many demonstrations are shown."""
        template = self.templates[int(generator.integers(len(self.templates)))]
        shown = draw_rows(task.rows, self.shots, query, generator, self.other_labels)
        parts = [filled(template, text_of(row), self._word(row)) for row in shown]
        parts.append(filled(template, text_of(query), None))
        turns = [Message("user", "\n\n".join(parts)), Message("assistant", self._word(query))]
        return edited_row(query, turns) | {self.task: task.name}, len(shown)

    def remember(self, table: TokenTable, ctx: Context) -> dict[str, np.ndarray]:
        """The number of its task, and of its batch, of every token. Raises DataError where two words begin alike."""
        from ftrun.data.tokens import first_places

        rows = edited_rows(ctx)
        of_row = np.asarray(table.record)
        names = [str(rows[record][self.task]) for record in of_row]
        number = {name: at for at, name in enumerate(sorted(set(names)))}
        tasks = np.array([number[name] for name in names])
        first_token: dict[tuple[str, int], str] = {}
        places = first_places(table)
        sequences = np.searchsorted(table.offsets, places, side="right") - 1
        for place, sequence in zip(places, sequences, strict=True):
            word = rows[of_row[sequence]]["messages"][-1]["content"]
            other = first_token.setdefault((names[sequence], int(table.input_ids[place])), word)
            if other != word:
                raise DataError(
                    f'the label words "{other}" and "{word}" begin with the same token',
                    f"tokens.words of task {names[sequence]}".rstrip(),
                    "Give them other words with tokens.words={label: word}.",
                )
        batches = self._batches(tasks, ctx)
        return {
            "task": np.repeat(tasks, table.lengths).astype(np.float32),
            "batch": np.repeat(batches, table.lengths).astype(np.float32),
        }

    def order(self, table: TokenTable) -> np.ndarray | None:
        return table.remembered["batch"][table.offsets[:-1]].astype(np.int64)

    def _batches(self, tasks: np.ndarray, ctx: Context) -> np.ndarray:
        """Number of the batch of every row, (rows,): whole batches of one task in random order, what is left over last."""
        size = ctx.settings.train.batch_size
        generator = np.random.default_rng([ctx.seed, size])
        whole, left = [], []
        for task in np.unique(tasks):
            rows = generator.permutation(np.flatnonzero(tasks == task))
            cut = len(rows) // size * size
            whole += list(rows[:cut].reshape(-1, size))
            left += rows[cut:].tolist()
        found = np.full(len(tasks), len(whole))
        for number, at in enumerate(generator.permutation(len(whole))):
            found[whole[at]] = number
        if left:
            ctx.report.warn(
                f"{len(left)} rows fill no batch of their task (some were left out): the last ones mix tasks"
            )
        return found

    def _word(self, record: Record) -> str:
        return self.words.get(str(record.label), str(record.label))
