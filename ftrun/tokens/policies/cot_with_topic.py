"""Exam tasks answered with their topic and a solution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftrun.data.records import Message
from ftrun.errors import ConfigError, DataError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy, edited_row

if TYPE_CHECKING:
    from ftrun.data.records import Record
    from ftrun.training.context import Context

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@register("tokens", "cot_with_topic")
@dataclass
class CotWithTopic(TokenPolicy):
    """Three forms of the answer to an exam task (Syromiatnikov et al., 2025, arXiv:2503.13988).

    letters: the letters of the right options. cot: the solution, then the letters. topic_cot: a line with the topic, the
    solution, the letters. All begin with ``keyword``, as the prompt asks. Rows have a question (the user's turn), a
    solution (the response), an answer, and columns with the options and the topic. Held-out rows take the same form.
    """

    target: Literal["letters", "cot", "topic_cot"] = "topic_cot"  # what the model learns to write
    options: str = "options"  # column of the options: a list, letters with their texts, or text; a row may have none
    topic: str = "topic"  # column of the topic
    keyword: str = "Answer:"  # begins every response, and the line with the letters
    ask: str = 'Give {detailed}answer to the task, beginning with the keyword "{keyword}"{options}.{letters}'  # request
    separator: str = ";"  # between several letters

    edits: ClassVar[bool] = True
    edits_heldout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.keyword.strip():
            raise ConfigError("tokens.keyword is empty", "tokens.keyword")
        try:
            self.ask.format(detailed="", keyword="", options="", letters="")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"tokens.ask holds something in braces that has no meaning: {error}",
                "tokens.ask",
                "It may hold {detailed}, {keyword}, {options} and {letters}.",
            ) from error

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        for record in records:
            if [message.role for message in record.prompt if message.role != "system"] != ["user"]:
                raise DataError(
                    f"row {record.id} is not one question with its solution",
                    "tokens=cot_with_topic",
                    "Give rows with one user turn before the response.",
                )
            letters = self.letters_of(record)
            asked = Message("user", self.prompt(record))
            answer = Message("assistant", self.answer(record, letters))
            before = [message for message in record.prompt if message.role == "system"]
            yield edited_row(record, [*before, asked, answer]) | {"answer": f"{self.keyword} {letters}"}

    def prompt(self, record: Record) -> str:
        """Request, task and options; the same for cot and topic_cot."""
        options = self.options_of(record)
        brief = self.target == "letters" and bool(options)
        request = self.ask.format(
            detailed="an " if brief else "a detailed ",
            keyword=self.keyword,
            options=" and using only the options below" if options else "",
            letters=f' Write only the letter of the right option; separate several letters by "{self.separator}".'
            if brief
            else "",
        )
        listed = "\n".join(["Options:", *(f"{letter} - {text}" for letter, text in options)]) if options else ""
        return "\n\n".join(part for part in (request, f"Task: {record.prompt[-1].content}", listed) if part)

    def answer(self, record: Record, letters: str) -> str:
        """The response to train."""
        last = f"{self.keyword} {letters}"
        if self.target == "letters":
            return last
        lines = [self.keyword, record.response.strip(), last]
        if self.target == "topic_cot":
            lines.insert(1, f"TOPIC: {self._text(record, self.topic)}")
        return "\n".join(lines)

    def options_of(self, record: Record) -> list[tuple[str, str]]:
        """Letters with their texts. Raises DataError where they are neither a list of texts nor a mapping to texts."""
        options = record.fields.get(self.options)
        if options is None or options in ("", [], {}):
            return []
        if isinstance(options, str):
            options = [line for line in options.splitlines() if line.strip()]
        if isinstance(options, list) and len(options) <= len(LETTERS):
            options = dict(zip(LETTERS, options, strict=False))
        if not isinstance(options, dict) or any(isinstance(text, (list, dict)) for text in options.values()):
            raise DataError(
                f'row {record.id} has no list of up to {len(LETTERS)} options in the column "{self.options}"',
                f"tokens.options={self.options}",
                "Give a list of texts, or letters with their texts.",
            )
        return [(str(letter), str(text)) for letter, text in options.items()]

    def letters_of(self, record: Record) -> str:
        """The answer as text; the number of an option, from 0, as its letter. Raises DataError where there is none."""
        answer = record.answer
        parts = answer if isinstance(answer, list) else [answer]
        options = self.options_of(record)
        found = []
        for part in parts:
            if isinstance(part, int) and not isinstance(part, bool) and options:
                if not 0 <= part < len(options):
                    raise DataError(
                        f"row {record.id} has the answer {part}, and {len(options)} options from 0 on",
                        'column "answer"',
                        "Give the letter of the option, or its number counted from 0.",
                    )
                found.append(options[part][0])
            elif part is not None and str(part).strip():
                found.append(str(part).strip())
        if not found:
            raise DataError(
                f"row {record.id} has no answer",
                'column "answer"',
                "Name the column with data.columns={answer: NAME}, or remove the row.",
            )
        return self.separator.join(found)

    def _text(self, record: Record, column: str) -> str:
        text = record.fields.get(column)
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f'row {record.id} has no text in the column "{column}"',
                f"tokens.topic={column}",
                "Name the column of the topic, or use tokens.target=cot.",
            )
        return text.strip()
