"""One row in the one shape that everything downstream reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Kind = Literal["sft", "text", "pairs", "binary", "prompts", "labels"]


@dataclass(frozen=True)
class Message:
    """One turn. ``calls`` are calls of tools as chat templates take them: ``{type: function, function: {...}}``."""

    role: Role
    content: str
    weight: float | None = None  # of its tokens in the loss, 0: none; None: the file does not say
    thought: str = ""  # what an assistant thinks before it speaks
    calls: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    spelled: bool = False  # the content is the text of the calls, for templates that do not write calls
    name: str | None = None  # of who speaks, or of the tool
    call_id: str | None = None  # of the call that a tool answers

    @property
    def text(self) -> str:
        """All that the turn says: thought, content and calls."""
        thought = f"<think>\n{self.thought}\n</think>\n\n" if self.thought else ""
        calls = "" if self.spelled else "\n".join(json.dumps(_plain(call), ensure_ascii=False) for call in self.calls)
        return thought + "\n".join(part for part in (self.content, calls) if part)

    def turn(self) -> dict[str, Any]:
        """The message as it would stand in a file."""
        role = "function_call" if self.spelled else self.role
        further = {
            "weight": self.weight,
            "reasoning_content": self.thought or None,
            "tool_calls": list(self.calls) if self.calls and not self.spelled else None,
            "name": self.name,
            "tool_call_id": self.call_id,
        }
        return {"role": role, "content": self.content} | {k: v for k, v in further.items() if v is not None}


def _plain(call: dict[str, Any]) -> Any:
    function = call.get("function", call)
    return {"name": function["name"], "arguments": function.get("arguments", {})}


def answers(messages: Sequence[Message]) -> list[int]:
    """Places of the assistant's turns that answer something; a greeting before anybody spoke is context."""
    first = next((at for at, turn in enumerate(messages) if turn.role in ("user", "tool")), len(messages))
    return [at for at, turn in enumerate(messages) if turn.role == "assistant" and at > first]


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
    tools: tuple[dict[str, Any], ...] = field(default=(), hash=False)  # that a conversation offers, as JSON schemas
    text: str = ""
    text_pair: str | None = None
    label: str | int | None = None
    answer: Any = None  # gold answer, for verifiers and exact match
    verifier: str | None = None  # name of the verifier that a built-in source brings
    fields: dict[str, Any] = field(default_factory=dict)  # the row as it was read, fields unchanged

    @property
    def texts(self) -> list[str]:
        """Everything that the row says, whatever its kind."""
        said = [message.text for message in (*self.messages, *self.chosen, *self.rejected)]
        return [text for text in (*said, self.text, self.text_pair) if text]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last assistant turn."""
        return self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages

    @property
    def response(self) -> str:
        """The last assistant turn, with its thought in <think> tags and its calls as JSON where it has them."""
        return self.messages[-1].text if self.messages and self.messages[-1].role == "assistant" else ""
