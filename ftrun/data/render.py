"""From a Record to token sequences by the tokenizer's own chat template.

A conversation is rendered in segments: the template's text for the messages before an assistant turn, generation prompt
included, is a prefix of its text with that turn. Every segment is tokenised by itself, so the tokens of the prompt are
those that generation sees, and the trained span needs no search for strings.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError

from ftrun.data.encode import Encoder, Segment
from ftrun.data.records import Message, Record
from ftrun.data.tokens import Sequence
from ftrun.errors import ConfigError, DataError, nearest

TEMPLATES = Path(__file__).parent / "templates"
WAY_OUT = "Give one with model.template=chatml|alpaca|plain, or model.template=FILE.jinja."
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

TrainOn = Literal["responses", "last_response", "all"]


def apply_template(tokenizer: Any, setting: str | None) -> None:
    """Give the tokenizer the chat template of ``model.template``: a built-in name or a jinja file; None keeps its own."""
    if setting is None:
        return
    built_in = {file.stem: file for file in TEMPLATES.glob("*.jinja")}
    file = built_in.get(setting) or Path(setting).expanduser()
    if not file.is_file():
        raise ConfigError(
            f'there is no chat template "{setting}"',
            f"model.template={setting}",
            f"{nearest(setting, built_in)} Or name a jinja file.",
        )
    if setting in ("alpaca", "plain") and tokenizer.eos_token is None:
        raise ConfigError(
            f"the template {setting} ends a response with the end-of-text token, and the tokenizer has none",
            f"model.template={setting}",
        )
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template {file} is not valid jinja: {error.message}",
            f"{file}:{error.lineno}",
            "Repair the file.",
        ) from error
    except TemplateError as error:
        raise ConfigError(
            f"the chat template {file} cannot render a user's message: {error}", str(file), "Repair the file."
        ) from error


def prompt_ids(record: Record, tokenizer: Any) -> list[int]:
    """Tokens after which the model is to write the record's response."""
    return Renderer(tokenizer).prompt_ids(record)


@dataclass
class Renderer:
    """Turns records into sequences. Raises DataError where a row, ConfigError where the template cannot be trained on."""

    tokenizer: Any
    train_on: TrainOn = "responses"
    labels: ListLike[str | int] = ()  # class names, for kind "labels"

    def sequences(self, record: Record, where: str = "") -> list[Sequence]:
        """One sequence, or chosen and rejected for a pair."""
        return self.batch([record], [where])[0]

    def batch(self, records: list[Record], where: list[str]) -> list[list[Sequence]]:
        """Sequences of each record; ``where`` is the origin of each, for errors. One call of the tokenizer for all."""
        if not records or records[0].kind == "labels":
            return [[self._labelled(record, place)] for record, place in zip(records, where, strict=True)]
        if records[0].kind == "text":
            return [[self._plain_text(record, place)] for record, place in zip(records, where, strict=True)]
        rendered = [self._segments(record, place) for record, place in zip(records, where, strict=True)]
        tokens = iter(self._encoder.encode([sequence for parts in rendered for sequence in parts]))
        made = []
        for record, place, parts in zip(records, where, rendered, strict=True):
            made.append([self._sequence(record, place, segments, next(tokens)) for segments in parts])
        return made

    def prompt_ids(self, record: Record, where: str = "") -> list[int]:
        """Tokens after which the model is to write the record's response; what it was trained on, cut before the response."""
        messages = record.prompt if record.kind in ("sft", "binary") else record.messages
        segments = self._conversation(list(messages), range(0), where, generate=True)
        return [token for part in self._encoder.encode([segments])[0] for token in part]

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @cached_property
    def end_of_turn(self) -> int:
        """The token that closes an assistant's turn: what the model learns to stop with."""
        probe = [Message("user", "a"), Message("assistant", "b")]
        segments = self._conversation(probe, range(1, 2), "", generate=False)
        tokens = self._encoder.encode([segments])[0]
        end = self._encoder.turn_end(tokens[-1])
        if end is None:
            raise ConfigError(
                "the chat template ends an assistant's turn without an end-of-turn token: the model would never learn to stop",
                f"it ends with {segments[-1].text!r}; the tokenizer's special tokens: {', '.join(map(str, self.tokenizer.all_special_tokens))}",
                "Use another template with model.template=alpaca|plain, or one whose markers are tokens of this tokenizer.",
            )
        return tokens[-1][end]

    # ---- segments ----

    def _segments(self, record: Record, where: str) -> list[list[Segment]]:
        if record.kind == "prompts":
            return [self._conversation(list(record.messages), range(0), where, generate=True)]
        if record.kind == "pairs":
            start = len(record.messages)
            sides = [[*record.messages, *side] for side in (record.chosen, record.rejected)]
            return [self._conversation(side, range(start, len(side)), where, generate=False) for side in sides]
        count = len(record.messages)
        first = count - 1 if self.train_on == "last_response" else 0
        return [self._conversation(list(record.messages), range(first, count), where, generate=False)]

    def _conversation(self, messages: list[Message], trained: range, where: str, generate: bool) -> list[Segment]:
        """Segments of a conversation; assistant turns whose index is in ``trained`` carry loss.

        An assistant turn that opens the conversation is context: there is nothing that it answers.
        """
        segments: list[Segment] = []
        done = ""
        turns = [index for index, message in enumerate(messages) if message.role == "assistant" and index > 0]
        for index in turns:
            prompt, answered = (
                self._render(messages[:index], True, where),
                self._render(messages[: index + 1], False, where),
            )
            if not answered.startswith(prompt):
                raise ConfigError(
                    "the chat template's generation prompt is not how it begins an assistant's turn: training and generation would differ",
                    f"{where}: {_difference(prompt, answered)}".lstrip(": "),
                    WAY_OUT,
                )
            if not prompt.startswith(done):
                return self._last_turn_only(messages, turns, trained, where, generate)
            segments += [
                Segment(prompt[len(done) :], False),
                Segment(answered[len(prompt) :], index in trained, response=True),
            ]
            done = answered
        if not turns or turns[-1] != len(messages) - 1:
            rest = self._render(messages, generate, where)
            if not rest.startswith(done):
                return self._last_turn_only(messages, turns, trained, where, generate)
            segments.append(Segment(rest[len(done) :], False))
        return [segment for segment in segments if segment.text]

    def _last_turn_only(
        self, messages: list[Message], turns: list[int], trained: range, where: str, generate: bool
    ) -> list[Segment]:
        """For templates that rewrite earlier turns (dropped thoughts): the prompt in one piece, and the last response."""
        if any(index in trained for index in turns[:-1]):
            raise DataError(
                "the chat template rewrites earlier turns as the conversation goes on, so not all of them can be trained in one row",
                where,
                "Train the last one with data.train_on=last_response, or give another template with model.template.",
            )
        if generate or turns[-1] != len(messages) - 1:
            return [Segment(self._render(messages, generate, where), False)]
        prompt, whole = self._render(messages[:-1], True, where), self._render(messages, False, where)
        return [Segment(prompt, False), Segment(whole[len(prompt) :], turns[-1] in trained, response=True)]

    def _render(self, messages: list[Message], generate: bool, where: str) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self._template, tokenize=False, add_generation_prompt=generate
            )
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"the chat template refuses this conversation ({roles}): {error}",
                where,
                "Change the row, or give another template with model.template.",
            ) from error

    @cached_property
    def _template(self) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template, so nobody can say what a conversation looks like to the model",
                "model.template",
                WAY_OUT,
            )
        template = self.tokenizer.get_chat_template()
        return CLOCK + template if "strftime_now" in template else template

    # ---- tokens ----

    def _sequence(self, record: Record, where: str, segments: list[Segment], parts: list[list[int]]) -> Sequence:
        ids = np.array([token for part in parts for token in part], np.int32)
        weight = np.zeros(len(ids), np.float32)
        start = 0
        for segment, part in zip(segments, parts, strict=True):
            if segment.trained:
                end = self._encoder.turn_end(part)
                if end is None or part[end] != self.end_of_turn:
                    raise DataError(
                        f"row {record.id} would be trained without its end of turn",
                        where,
                        "The chat template does not close this turn; give another with model.template.",
                    )
                weight[start : start + end + 1] = 1.0
            start += len(part)
        if self.train_on == "all" and record.kind in ("sft", "binary"):
            weight[1:] = 1.0
        self._refuse_double_bos(ids, record, where)
        label = int(record.label) if record.kind == "binary" and record.label is not None else -1
        return Sequence(ids, weight, record.id, label)

    def _plain_text(self, record: Record, where: str) -> Sequence:
        """Tokens of a text as the tokenizer begins it, and the end-of-text token; all are trained but the first."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ConfigError(
                "the tokenizer has no end-of-text token, so texts cannot be told apart",
                "data.format=text",
                "Use another tokenizer.",
            )
        ids = list(self.tokenizer(record.text, truncation=False, verbose=False)["input_ids"])
        tokens = np.array(ids if ids[-1:] == [eos] else [*ids, eos], np.int32)
        weight = np.ones(len(tokens), np.float32)
        weight[:1] = 0.0
        self._refuse_double_bos(tokens, record, where)
        return Sequence(tokens, weight, record.id)

    def _labelled(self, record: Record, where: str, max_length: int | None = None) -> Sequence:
        if record.label is None or record.label not in self.labels:
            raise DataError(
                f'row {record.id} has the label "{record.label}", which the training rows do not have',
                where,
                "Known: " + ", ".join(map(str, self.labels)),
            )
        cut: dict[str, Any] = {"truncation": max_length is not None, "max_length": max_length, "verbose": False}
        ids = np.array(self.tokenizer(record.text, record.text_pair, **cut)["input_ids"], np.int32)
        return Sequence(ids, np.zeros(len(ids), np.float32), record.id, list(self.labels).index(record.label))

    def truncated(self, record: Record, sequence: Sequence, max_length: int, where: str) -> Sequence:
        """The first ``max_length`` tokens; a labelled text is cut by its tokenizer, which keeps the closing token."""
        if record.kind == "labels":
            return self._labelled(record, where, max_length)
        return Sequence(
            sequence.input_ids[:max_length], sequence.loss_weight[:max_length], sequence.record, sequence.label
        )

    def pieces(self, sequence: Sequence, max_length: int) -> list[Sequence]:
        """A text cut into pieces of at most ``max_length`` tokens, each beginning with the last token of the one before.

        That token is there to predict from; so every token but the text's first is a target in exactly one piece.
        """
        found = []
        for start in range(0, max(1, len(sequence.input_ids) - 1), max_length - 1):
            part = slice(start, start + max_length)
            weight = np.array(sequence.loss_weight[part])
            weight[:1] = 0.0
            found.append(Sequence(sequence.input_ids[part], weight, sequence.record, sequence.label))
        return found

    def _refuse_double_bos(self, ids: np.ndarray, record: Record, where: str) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            source = (
                "its text begins with one, and the tokenizer adds another"
                if record.kind == "text"
                else "the chat template writes it twice, or the row begins with one"
            )
            raise DataError(
                f"row {record.id} begins with {self.tokenizer.bos_token} twice: {source}", where, "Remove one of them."
            )


def _difference(expected: str, found: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    return f"the prompt goes on with {expected[same : same + 30]!r}, the conversation with {found[same : same + 30]!r}"
