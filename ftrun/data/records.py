"""One row in the one shape that everything downstream reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Kind = Literal["sft", "text", "pairs", "binary", "prompts", "labels"]


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True)
class Record:
    """A row of a pool.

    ``kind`` says which fields hold something: sft: messages, ending with an assistant turn; text: text;
    pairs: messages (the prompt) and chosen, rejected; binary: messages as in sft and label, 1 wanted or 0 unwanted; prompts: messages and answer; labels: text (and text_pair), label.
    """

    id: int  # row number in the pool, from 0
    kind: Kind
    messages: tuple[Message, ...] = ()
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    text: str = ""
    text_pair: str | None = None
    label: str | int | None = None
    answer: Any = None  # gold answer, for verifiers and exact match
    verifier: str | None = None  # name of the verifier that a built-in source brings
    fields: dict[str, Any] = field(default_factory=dict)  # the row as it was read, fields unchanged

    @property
    def texts(self) -> list[str]:
        """Everything that the row says, whatever its kind."""
        said = [message.content for message in (*self.messages, *self.chosen, *self.rejected)]
        return [text for text in (*said, self.text, self.text_pair) if text]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last assistant turn."""
        return self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages

    @property
    def response(self) -> str:
        """The last assistant turn."""
        return self.messages[-1].content if self.messages and self.messages[-1].role == "assistant" else ""
