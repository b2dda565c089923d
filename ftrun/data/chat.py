"""Conversations as the tokenizer's chat template writes them, and what it would leave out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from ftrun.data.literals import Literals
from ftrun.data.meanings import THOUGHTS
from ftrun.data.records import Message
from ftrun.data.sandbox import bound_templates
from ftrun.data.turns import from_json
from ftrun.errors import ConfigError, DataError

WAY_OUT = "Give one with model.template=chatml|alpaca|plain, or model.template=FILE.jinja."
OTHER = "Give another template with model.template, or leave the row out."
# Templates that write the date get this one: tokens must not change overnight.
DATE = {
    "%-d": "26",
    "%d": "26",
    "%b": "Jul",
    "%B": "July",
    "%m": "07",
    "%Y": "2024",
    "%y": "24",
    "%A": "Friday",
    "%a": "Fri",
}
CLOCK = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f"|replace('{code}', '{text}')" for code, text in DATE.items())
    + " -}}{%- endmacro -%}"
)
PROBE = "wordless"  # what a template is asked to write, to learn what it writes
PROBED = {"type": "function", "function": {"name": PROBE, "arguments": {PROBE: PROBE}}, "id": "a1b2c3d4e"}


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer."""

    tokenizer: Any

    def conversation(self, messages: Sequence[Message], tools: Sequence[Any] = (), where: str = "") -> Conversation:
        """The messages as the template takes them, control tokens in them hidden. Raises DataError."""
        turns = [self._turn(message, number, where) for number, message in enumerate(messages, start=1)]
        return Conversation(self, list(messages), turns, self.literals.hide(list(tools)), where)

    def render(self, turns: list[dict[str, Any]], asks: bool, tools: list[Any] | None = None) -> str:
        """Text of these turns; ``asks`` adds what introduces an answer. Raises what templates raise."""
        bound_templates()
        try:
            return self._render(turns, asks, tools)
        except (RecursionError, MemoryError, OverflowError) as error:
            raise TemplateError(f"it does not end: {type(error).__name__}") from None

    def _render(self, turns: list[dict[str, Any]], asks: bool, tools: list[Any] | None) -> str:
        return self.tokenizer.apply_chat_template(
            turns,
            tools=tools or None,
            chat_template=self._text(tools or None),
            tokenize=False,
            add_generation_prompt=asks,
        )

    @cached_property
    def literals(self) -> Literals:
        return Literals(self.tokenizer)

    def _text(self, tools: list[Any] | None) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template, so nobody can say what a conversation looks like to the model",
                "model.template",
                WAY_OUT,
            )
        template = self.tokenizer.get_chat_template(tools=tools)
        return CLOCK + template if "strftime_now" in template else template

    # ---- what it takes ----

    def _turn(self, message: Message, number: int, where: str) -> dict[str, Any]:
        hide = self.literals.hide
        turn: dict[str, Any] = {"role": message.role, "content": hide(message.content)}
        if message.name:
            turn["name"] = hide(message.name)
        if message.call_id:
            turn["tool_call_id"] = message.call_id
        if message.thought:
            if self._thought_key is None:
                raise DataError(
                    f"the chat template does not write reasoning_content, and turn {number} has one",
                    where,
                    "Write the thought into the content, in <think> tags, or give another template with model.template.",
                )
            turn[self._thought_key] = hide(message.thought)
        if message.calls and not (message.spelled and self._calls_form is None):
            turn |= self._calls(message, number, where)
        return turn

    def _calls(self, message: Message, number: int, where: str) -> dict[str, Any]:
        if self._calls_form is None:
            raise DataError(
                f"the chat template does not write tool_calls, and turn {number} has them",
                where,
                "Write the call into the turn's content, or give another template with model.template.",
            )
        empty, as_text = self._calls_form
        content = empty if message.spelled or not message.content else self.literals.hide(message.content)
        return {"content": content, "tool_calls": [_call(call, as_text) for call in self.literals.hide(message.calls)]}

    @cached_property
    def _thought_key(self) -> str | None:
        """The key under which the template looks for a thought."""
        for key in THOUGHTS:
            if PROBE in (self._probed({"content": "b", key: PROBE}) or ""):
                return key
        return None

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template writes the tools that it is given."""
        tool = {"type": "function", "function": {"name": PROBE, "description": "d", "parameters": {"type": "object"}}}
        return PROBE in (self._probed({"content": "b"}, [tool]) or "")

    @cached_property
    def turn_mark(self) -> str:
        """What introduces an answer."""
        asked = [{"role": "user", "content": "a"}]
        return self.render(asked, True).removeprefix(self.render(asked, False))

    @cached_property
    def _calls_form(self) -> tuple[str | None, bool] | None:
        """How the template wants a call: the content of a turn that has no other, and whether arguments are JSON text."""
        for as_text in (False, True):
            for empty in (None, ""):
                text = self._probed({"content": empty, "tool_calls": [_call(PROBED, as_text)]})
                if text is not None and text.count(PROBE) >= 3 and "None" not in text:
                    return empty, as_text
        return None

    def _probed(self, answer: dict[str, Any], tools: list[Any] | None = None) -> str | None:
        try:
            return self.render([{"role": "user", "content": "a"}, {"role": "assistant", **answer}], False, tools)
        except (TemplateError, TypeError, ValueError, KeyError):
            return None


@dataclass
class Conversation:
    """Messages on their way through a chat template."""

    template: ChatTemplate
    messages: list[Message]
    turns: list[dict[str, Any]]
    tools: list[Any]
    where: str

    def text(self, count: int, asks: bool) -> str:
        """Text of the first ``count`` turns. Raises DataError where the template refuses them."""
        try:
            return self.template.render(self.turns[:count], asks, self.tools)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(message.role for message in self.messages[:count])
            raise DataError(
                f"the chat template refuses this conversation ({roles}): {error}",
                self.where,
                "Change the row, or give another template with model.template.",
            ) from error

    def check_said(self, context: str, answers: dict[int, str]) -> None:
        """Raise DataError for anything that the rendered text leaves out.

        What is trained is looked for in the text of its own turn, ``answers`` by place, all else in what is context.
        Earlier answers that are not trained are the template's to rewrite: it does the same when the model is used.
        """
        for tool in self.tools:
            name = str(tool["function"]["name"])
            if not self.template.writes_tools or not _holds(context, name):
                raise DataError(
                    f'the chat template does not write the tool "{name}" of the column tools',
                    self.where,
                    "Give a template that takes tools with model.template, or leave the column out with data.ignore=[tools].",
                )
        others = [str(turn["content"]) for turn in self.turns if turn["role"] != "assistant"]
        for at, turn in enumerate(self.turns):
            answer = turn["role"] == "assistant"
            if answer and at not in answers:
                continue
            for part in _parts(turn):
                times = 1 if answer else sum(other.count(part.strip()) for other in others) if part.strip() else 0
                if not _holds(answers[at] if answer else context, part, times):
                    shown = self.template.literals.show(part.strip())
                    raise DataError(
                        f"the chat template leaves out what turn {at + 1} ({turn['role']}) says: "
                        f"{shown[:40]!r}{'...' * (len(shown) > 40)}",
                        self.where,
                        OTHER,
                    )


def _call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    function = call["function"]
    if not as_text or isinstance(function["arguments"], str):
        return call
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _parts(turn: dict[str, Any]) -> Iterator[str]:
    """What the text of a turn must hold, in parts between which a template may write what it likes."""
    yield from str(turn["content"] or "").replace("<think>", "</think>").split("</think>")
    yield from (turn[key] for key in THOUGHTS if key in turn)
    for call in turn.get("tool_calls", ()):
        yield call["function"]["name"]
        arguments = call["function"]["arguments"]
        yield from _leaves(from_json(arguments))


def _leaves(value: Any) -> Iterator[str]:
    """The texts in arguments."""
    if isinstance(value, str):
        yield value
    items: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        yield from _leaves(item)


def _holds(text: str, part: str, times: int = 1) -> bool:
    """Whether a text holds a part so many times, white space aside, or the part as JSON writes it."""
    part = part.strip()
    if not part or (times == 1 and part in text) or text.count(part) >= times:
        return True
    written = (part, *(json.dumps(part, ensure_ascii=ascii)[1:-1] for ascii in (False, True)))
    shrunk = _shrunk(text)
    return sum(shrunk.count(form) for form in set(map(_shrunk, written))) >= times


def _shrunk(text: str) -> str:
    return "".join(text.split())
