"""Labels replaced by arbitrary symbols, whose meaning only the examples in the prompt tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftrun.data.pool import load_pool
from ftrun.data.records import Message, Record
from ftrun.errors import ConfigError, DataError
from ftrun.registry import register
from ftrun.runs.artifacts import cache_dir
from ftrun.tokens.base import TokenPolicy, edited_row
from ftrun.tokens.demonstrations import Label, Task, draw_rows, filled, generator_of, tasks_of, text_of

if TYPE_CHECKING:
    from ftrun.training.context import Context

# an example; what stands before {label} ends the prompt
TEMPLATES = (
    "Input: {text}\nOutput: {label}",
    "Input: {text}\nLabel: {label}",
    "Input: {text}\nSymbol: {label}",
    "Question: {text}\nAnswer: {label}",
    "Q: {text}\nA: {label}",
    "Text: {text}\nClass: {label}",
    "Sentence: {text}\nTarget: {label}",
    "Student: {text}\nTeacher: {label}",
    "X = {text}\nY = {label}",
    "{text}\n-> {label}",
)
WORD = re.compile(
    r"[\u0120\u2581]([a-z]{5,})"
)  # a vocabulary's entry that is a whole word, as BPE or SentencePiece mark it
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class Symbols:
    """Numbers, letters and words that stand for labels; those for training and for evaluation have none in common.

    Training: numbers of 1 to 4 digits, 1 to 3 letters, one half of the words. Evaluation: 5 digits, 4 letters, the
    other half. Words have 5 letters or more.
    """

    words: list[str]
    heldout: bool

    def __post_init__(self) -> None:
        self.words = sorted(set(self.words))[int(self.heldout) :: 2]
        self.numbers = range(10_000, 100_000) if self.heldout else range(10_000)
        self.letters = (4,) if self.heldout else (1, 2, 3)
        self.spelt = sum(26**length for length in self.letters)

    def __len__(self) -> int:
        return len(self.numbers) + self.spelt + len(self.words)

    def __getitem__(self, place: int) -> str:
        if place < len(self.numbers):
            return str(self.numbers[place])
        place -= len(self.numbers)
        if place >= self.spelt:
            return self.words[place - self.spelt]
        for length in self.letters:
            if place < 26**length:
                return "".join(LETTERS[place // 26**power % 26] for power in reversed(range(length)))
            place -= 26**length
        raise IndexError(place)

    def draw(self, labels: list[Label], generator: np.random.Generator) -> dict[Label, str]:
        """A symbol for each label, all different, and none that is the name of a label."""
        names = {str(label).casefold() for label in labels}
        drawn: list[str] = []
        while len(drawn) < len(labels):
            symbol = self[int(generator.integers(len(self)))]
            if symbol not in names and symbol not in drawn:
                drawn.append(symbol)
        return dict(zip(labels, drawn, strict=True))


@register("tokens", "symbol_tuning")
@dataclass
class SymbolTuning(TokenPolicy):
    """In-context classification with symbols instead of labels (Wei et al., 2023, arXiv:2305.08298).

    Each labelled row becomes ``draws`` prompts: between ``least`` and ``most`` examples of every class of its task, in
    one of ten templates and without an instruction, then the row itself. Each prompt has symbols of its own for the
    classes, drawn from about 30,000; the answer, which alone is trained, is the symbol of the row's class. Held-out rows
    get symbols from another pool, so that evaluation measures what is learnt in context.
    """

    least: int = 2  # examples of each class in a prompt, at least ...
    most: int = 10  # ... and at most; fewer where the task has no more
    draws: int = 1  # prompts made of each row, with other examples and symbols: as many epochs
    task: str = "task"  # column that tells the task of a row; rows without it are one task
    instructions: str | None = None  # rows of ordinary instructions to mix in: small models need them
    share: float = 0.16  # share of the symbol prompts where instructions are mixed in

    edits: ClassVar[bool] = True
    eats: ClassVar[tuple[str, ...]] = ("labels",)
    edits_heldout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError("1 <= tokens.least <= tokens.most must hold", f"{self.least} to {self.most}")
        if self.draws < 1:
            raise ConfigError("tokens.draws must be 1 or more", f"tokens.draws={self.draws}")
        if not 0 < self.share <= 1:
            raise ConfigError("tokens.share is a share above 0 and up to 1", f"tokens.share={self.share}")

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        from ftrun.models.load import load_tokenizer

        heldout = records is ctx.heldout
        vocabulary = load_tokenizer(ctx.settings.model).get_vocab()
        words = [match[1] for match in map(WORD.fullmatch, vocabulary) if match]
        symbols = Symbols(words, heldout)
        made = lost = 0
        for task in tasks_of(records, self.task):
            for draw in range(1 if heldout else self.draws):
                for query in task.rows:
                    row = self.prompt(query, task, symbols, generator_of(query, draw, ctx.seed))
                    made, lost = made + (row is not None), lost + (row is None)
                    if row is not None:
                        yield row
        if lost:
            ctx.report.warn(f"{lost} prompts are left out: their task has one class, or a class without another row")
        if heldout:
            return
        if self.instructions is not None:
            yield from self._mixed_in(made, ctx)
        else:
            ctx.report.note(
                "no instructions are mixed in: models of 8B and less lose skill on ordinary labels (tokens.instructions)"
            )

    def prompt(
        self, query: Record, task: Task, symbols: Symbols, generator: np.random.Generator
    ) -> dict[str, Any] | None:
        """The row's prompt and its symbol; None where a class has no example, or is the only one."""
        examples = []
        for label in task.labels:
            count = int(generator.integers(self.least, self.most + 1))
            examples.append(draw_rows(task.by_label[label], count, query, generator))
        if len(examples) < 2 or not all(examples):
            return None
        meaning = symbols.draw(task.labels, generator)
        template = TEMPLATES[int(generator.integers(len(TEMPLATES)))]
        shown = [row for rows in examples for row in rows]
        parts = [
            filled(template, text_of(shown[at]), meaning[shown[at].label]) for at in generator.permutation(len(shown))
        ]
        parts.append(filled(template, text_of(query), None))
        assert query.label is not None
        turns = [Message("user", "\n\n".join(parts)), Message("assistant", meaning[query.label])]
        symbols_of = {str(label): symbol for label, symbol in meaning.items()}
        return edited_row(query, turns) | {"symbols": symbols_of}

    def _mixed_in(self, made: int, ctx: Context) -> Iterator[dict[str, Any]]:
        """As many rows of ordinary instructions as leave the symbol prompts their share."""
        assert self.instructions is not None
        data = replace(ctx.settings.data, path=self.instructions, format="auto", columns={}, weights=None, limit=None)
        pool = load_pool(data, cache_dir() / "data", ctx.seed)
        if pool.kind != "sft":
            raise DataError(
                f"{self.instructions} holds {pool.kind} rows, not instructions with responses",
                f"tokens.instructions={self.instructions}",
            )
        wanted = round(made * (1 - self.share) / self.share)
        drawn = np.sort(np.random.default_rng(ctx.seed).permutation(len(pool))[:wanted])
        ctx.report.note(f"{len(drawn)} rows of {self.instructions} are mixed in with {made} symbol prompts")
        if len(drawn) < wanted:
            ctx.report.warn(f"tokens.share={self.share:g} would take {wanted} rows of {self.instructions}")
        for place in drawn:
            record = pool[int(place)]
            yield edited_row(record, record.messages) | {"mixed_in": True}
