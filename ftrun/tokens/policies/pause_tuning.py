"""Pauses in long contexts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.errors import ConfigError, DataError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy, edited_row

if TYPE_CHECKING:
    from ftrun.data.records import Message, Record
    from ftrun.training.context import Context


@register("tokens", "pause_tuning")
@dataclass
class PauseTuning(TokenPolicy):
    """A mark after every segment of a long context, where attention can gather (Begin et al., 2025, arXiv:2502.20405).

    ``pause`` is plain text, written after every match of ``after`` in the user's turns; the vocabulary does not change,
    and as answers hold no pause, none is ever a target. The trained model wants the same pauses when it is asked:
    held-out rows and the prompts of `ftrun generate` get them too, other programs must write them.
    """

    pause: str = " <PAUSE> "  # the mark, as text
    after: str | None = r"\]"  # pattern of a segment's end, such as "\n\n+" for paragraphs; null: no pauses
    context: str | None = None  # column of the rows with the long text: pauses there only; null: in all user turns

    edits: ClassVar[bool] = True
    edits_heldout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.pause.strip():
            raise ConfigError("tokens.pause is empty: there would be no pause to see", "tokens.pause")
        try:
            empty = self.after is not None and re.search(self.after, "") is not None
        except re.error as error:
            raise ConfigError(
                f"tokens.after is no regular expression: {error}", f"tokens.after={self.after}"
            ) from error
        if empty:
            raise ConfigError("tokens.after matches the empty text: a pause would stand anywhere", "tokens.after")

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        rows = without = before = 0
        for record in records:
            marked = self._marked(record)
            messages = list(record.messages) if marked else self.with_pauses(record)
            rows, before = rows + 1, before + marked
            without += not marked and messages == list(record.messages)
            yield edited_row(record, messages)
        if before:
            ctx.report.note(f"{before} of {rows} rows already hold {self.pause.strip()}: they stay as they are")
        if without and self.after is not None:
            ctx.report.warn(f"{without} of {rows} rows get no pause: nothing in them matches tokens.after={self.after}")

    def edit_prompt(self, record: Record) -> Record:
        """The prompt with its pauses, in all user turns: which part of it is the context is not known."""
        if self._marked(record):
            return record
        return replace(record, messages=tuple(map(self._paused, record.messages)))

    def with_pauses(self, record: Record) -> list[Message]:
        """The record's conversation with its pauses. Raises DataError where the context is not in the prompt."""
        if self.context is None:
            return [self._paused(message) for message in record.messages]
        long = record.fields.get(self.context)
        if not isinstance(long, str) or not any(long in m.content for m in record.messages if m.role == "user"):
            raise DataError(
                f'row {record.id} has no text in the column "{self.context}" that its prompt repeats',
                f"tokens.context={self.context}",
                "Name the column that holds the long text, or leave tokens.context out.",
            )
        return [
            replace(m, content=m.content.replace(long, self.insert(long), 1)) if long and m.role == "user" else m
            for m in record.messages
        ]

    def insert(self, text: str) -> str:
        """The text with a pause after every segment."""
        return text if self.after is None else re.sub(self.after, lambda match: match.group() + self.pause, text)

    def _marked(self, record: Record) -> bool:
        """Whether a user turn holds pauses already; the system prompt may name them to explain them."""
        return any(self.pause.strip() in message.content for message in record.messages if message.role == "user")

    def _paused(self, message: Message) -> Message:
        return replace(message, content=self.insert(message.content)) if message.role == "user" else message
