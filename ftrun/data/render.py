"""From a Record to token sequences by the tokenizer's own chat template.

A conversation is rendered in segments: the template's text for the messages before an assistant turn, generation prompt
included, is a prefix of its text with that turn. Every segment is tokenised by itself, so the tokens of the prompt are
those that generation sees, and the trained span needs no search for strings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError

from ftrun.data.chat import WAY_OUT, ChatTemplate, Conversation
from ftrun.data.encode import Encoder, Segment
from ftrun.data.literals import OPEN, Unspellable
from ftrun.data.records import Message, Record, answers
from ftrun.data.tokens import Sequence
from ftrun.errors import ConfigError, DataError, nearest

TEMPLATES = Path(__file__).parent / "templates"
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
    begins = "{{- bos_token -}}" if setting in built_in and _adds_bos(tokenizer) else ""
    tokenizer.chat_template = begins + file.read_text(encoding="utf-8")
    try:
        ChatTemplate(tokenizer).render([{"role": "user", "content": "a"}], asks=True)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template {file} is not valid jinja: {error.message}",
            f"{file}:{error.lineno}",
            "Repair the file.",
        ) from error
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the chat template {file} cannot render a user's message: {error}", str(file), "Repair the file."
        ) from error


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with its BOS; one that merely has a BOS does not."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def prompt_ids(record: Record, tokenizer: Any) -> list[int]:
    """Tokens after which the model is to write the record's response."""
    return Renderer(tokenizer).prompt_ids(record)


@dataclass
class Renderer:
    """Turns records into sequences. Raises DataError where a row, ConfigError where the template cannot be trained on."""

    tokenizer: Any
    train_on: TrainOn = "responses"
    labels: ListLike[str | int] = ()  # class names, for kind "labels"
    spelled: Counter[str] = field(default_factory=Counter)  # rows that write a control token in a message, by token

    def sequences(self, record: Record, where: str = "") -> list[Sequence]:
        """One sequence, or chosen and rejected for a pair."""
        return self.batch([record], [where])[0]

    def batch(
        self, records: list[Record], where: list[str], refused: dict[int, DataError] | None = None
    ) -> list[list[Sequence]]:
        """Sequences of each record; ``where`` is the origin of each, for errors. One call of the tokenizer for all.

        With ``refused`` a row that cannot be trained has no sequences, and stands there with the reason.
        """
        places = list(zip(records, where, strict=True))
        if not records or records[0].kind == "labels":
            return [self._or_refused(self._labelled, record, place, refused) for record, place in places]
        if records[0].kind == "text":
            return [self._or_refused(self._plain_text, record, place, refused) for record, place in places]
        rendered = [self._or_refused(self._segments, record, place, refused) for record, place in places]
        plain = [sequence for parts in rendered for sequence in parts if not _hides(sequence)]
        tokens = iter(self._encoder.encode(plain))
        made = []
        for (record, place), parts in zip(places, rendered, strict=True):
            ids = [self._encoder.encode([one])[0] if _hides(one) else next(tokens) for one in parts]
            made.append(self._or_refused(self._joined, record, place, refused, parts, ids))
        return made

    def _or_refused(
        self,
        make: Callable[..., list[Any]],
        record: Record,
        where: str,
        refused: dict[int, DataError] | None,
        *parts: Any,
    ) -> list[Any]:
        """What is made of a record; nothing where it was or is refused, and that is only to be noted."""
        if refused is None:
            return make(record, where, *parts)
        if record.id in refused:
            return []
        try:
            return make(record, where, *parts)
        except DataError as error:
            refused[record.id] = error
            return []

    def _joined(
        self, record: Record, where: str, parts: list[list[Segment]], ids: list[list[list[int]]]
    ) -> list[Sequence]:
        return [self._sequence(record, where, *one) for one in zip(parts, ids, strict=True)]

    def prompt_ids(self, record: Record, where: str = "") -> list[int]:
        """Tokens after which the model is to write the record's response; what it was trained on, cut before the response."""
        messages = record.prompt if record.kind in ("sft", "binary") else record.messages
        segments = self._conversation(record, list(messages), [0.0] * len(messages), where, generate=True)
        if _hides(segments):
            self._refuse_unspellable(record, segments, where)
        return [token for part in self._encoder.encode([segments])[0] for token in part]

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    @cached_property
    def end_of_turn(self) -> int:
        """The token that closes an assistant's turn: what the model learns to stop with."""
        probe = [Message("user", "a"), Message("assistant", "b")]
        segments = self._conversation(Record(0, "sft"), probe, [0.0, 1.0], "", generate=False)
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
        """Segments of the record's one conversation, or of both sides of a pair."""
        if record.kind == "prompts":
            sides, start = [list(record.messages)], len(record.messages)
        elif record.kind == "pairs":
            sides, start = (
                [[*record.messages, *side] for side in (record.chosen, record.rejected)],
                len(record.messages),
            )
        else:
            sides = [list(record.messages)]
            start = len(record.messages) - 1 if self.train_on == "last_response" else 0
        asks = record.kind == "prompts"
        made = [
            self._conversation(record, side, self._weights(record, side, start, where), where, asks) for side in sides
        ]
        named: set[str] = set()
        for segments in filter(_hides, made):
            named |= self._encoder.literals.named("".join(segment.text for segment in segments))
            self._refuse_unspellable(record, segments, where)
        self.spelled.update(named)
        return made

    def _refuse_unspellable(self, record: Record, segments: list[Segment], where: str) -> None:
        try:
            self._encoder.encode([segments])
        except Unspellable as error:
            raise DataError(
                f"row {record.id} writes {error} in a message, and the tokenizer can only read it as a control token",
                where,
                "Write it in other words, or leave the row out.",
            ) from None

    def _weights(self, record: Record, messages: list[Message], start: int, where: str) -> list[float]:
        """Weight of every turn in the loss: what the file says of it, 1 where it says nothing; 0 before ``start``."""
        answered = set(answers(messages))
        return [
            self._answer_weight(record, turn.weight, where) * (at >= start)
            if at in answered
            else self._no_answer(record, turn, at, where)
            for at, turn in enumerate(messages)
        ]

    def _answer_weight(self, record: Record, asked: float | None, where: str) -> float:
        if record.kind == "pairs" and asked not in (None, 0, 1):
            raise DataError(
                f"row {record.id} gives an answer of a pair the weight {asked:g}", where, "Use 0 or 1, or leave it out."
            )
        return 1.0 if asked is None else asked

    def _no_answer(self, record: Record, turn: Message, at: int, where: str) -> float:
        """0, the weight of a turn that is no answer; refused where the file wants another than training gives it."""
        everything = self._trains_all(record)
        if turn.weight is None or turn.weight == float(everything):
            return 0.0
        who = f"the {turn.role} speaks" if turn.role != "assistant" else "opens the conversation"
        raise DataError(
            f"row {record.id} gives turn {at + 1}, which {who}, the weight {turn.weight:g}, and "
            + ("data.train_on=all trains every turn" if everything else "only answers are trained"),
            where,
            "Use data.train_on=responses."
            if everything
            else "Remove that weight, or train every turn with data.train_on=all.",
        )

    def _trains_all(self, record: Record) -> bool:
        return self.train_on == "all" and record.kind in ("sft", "binary")

    def _conversation(
        self, record: Record, messages: list[Message], weights: list[float], where: str, generate: bool
    ) -> list[Segment]:
        """Segments of a conversation, whose turns have these weights.

        An assistant turn before anybody else spoke is context: there is nothing that it answers.
        """
        chat = self._chat.conversation(messages, record.tools, where)
        segments: list[Segment] = []
        done = ""
        turns = answers(messages)
        said: dict[int, str] = {}
        for index in turns:
            prompt, answered = chat.text(index, True), chat.text(index + 1, False)
            if not answered.startswith(prompt):
                raise ConfigError(
                    "the chat template's generation prompt is not how it begins an assistant's turn: training and generation would differ",
                    f"{where}: {_difference(prompt, answered)}".lstrip(": "),
                    WAY_OUT,
                )
            if not prompt.startswith(done):
                return self._last_turn_only(record, chat, weights, generate)
            said[index] = answered[len(prompt) :]
            segments += [Segment(prompt[len(done) :], 0.0), Segment(said[index], weights[index], response=True)]
            done = answered
        if not turns or turns[-1] != len(messages) - 1:
            rest = chat.text(len(messages), generate)
            if not rest.startswith(done):
                return self._last_turn_only(record, chat, weights, generate)
            segments.append(Segment(rest[len(done) :], 0.0))
        context = "".join(segment.text for segment in segments if not segment.response)
        chat.check_said(context, {at: text for at, text in said.items() if weights[at] > 0})
        return [segment for segment in segments if segment.text]

    def _last_turn_only(
        self, record: Record, chat: Conversation, weights: list[float], generate: bool
    ) -> list[Segment]:
        """For templates that rewrite earlier turns (dropped thoughts): the prompt in one piece, and the last response."""
        last = len(weights) - 1
        earlier = [at for at in answers(chat.messages) if at < last]
        if any(weights[at] > 0 or (self._trains_all(record) and chat.messages[at].weight == 0) for at in earlier):
            raise DataError(
                "the chat template rewrites earlier turns as the conversation goes on, so not all of them can be trained in one row",
                chat.where,
                "Train the last one with data.train_on=last_response, or give another template with model.template.",
            )
        whole = chat.text(last + 1, generate)
        if generate or last not in answers(chat.messages):
            chat.check_said(whole, {})
            return [Segment(whole, 0.0)]
        prompt = chat.text(last, True)
        chat.check_said(prompt, {last: whole[len(prompt) :]} if weights[last] > 0 else {})
        return [Segment(prompt, 0.0), Segment(whole[len(prompt) :], weights[last], response=True)]

    # ---- tokens ----

    def _sequence(self, record: Record, where: str, segments: list[Segment], parts: list[list[int]]) -> Sequence:
        ids = np.array([token for part in parts for token in part], np.int32)
        everything = self._trains_all(record)
        weight = np.full(len(ids), float(everything), np.float32)
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
                weight[start : start + end + 1] = segment.weight
            elif segment.response:
                weight[start : start + len(part)] = 0.0
            start += len(part)
        weight[:1] = 0.0  # nothing predicts it
        self._refuse_double_bos(ids, record, where)
        label = int(record.label) if record.kind == "binary" and record.label is not None else -1
        return Sequence(ids, weight, record.id, label)

    def _plain_text(self, record: Record, where: str) -> list[Sequence]:
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
        return [Sequence(tokens, weight, record.id)]

    def _labelled(self, record: Record, where: str, max_length: int | None = None) -> list[Sequence]:
        if record.label is None or record.label not in self.labels:
            raise DataError(
                f'row {record.id} has the label "{record.label}", which the training rows do not have',
                where,
                "Known: " + ", ".join(map(str, self.labels)),
            )
        cut: dict[str, Any] = {"truncation": max_length is not None, "max_length": max_length, "verbose": False}
        ids = np.array(self.tokenizer(record.text, record.text_pair, **cut)["input_ids"], np.int32)
        return [Sequence(ids, np.zeros(len(ids), np.float32), record.id, list(self.labels).index(record.label))]

    def truncated(self, record: Record, sequence: Sequence, max_length: int, where: str) -> Sequence:
        """The first ``max_length`` tokens; a labelled text is cut by its tokenizer, which keeps the closing token."""
        if record.kind == "labels":
            return self._labelled(record, where, max_length)[0]
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

    def _begins_turns(self, record: Record) -> bool:
        """Whether the template begins every turn with the BOS: a second one is then the first turn's own."""
        return record.kind != "text" and self.tokenizer.bos_token in self._chat.turn_mark

    def _refuse_double_bos(self, ids: np.ndarray, record: Record, where: str) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos and not self._begins_turns(record):
            source = (
                "its text begins with one, and the tokenizer adds another"
                if record.kind == "text"
                else "the chat template writes it twice"
            )
            raise DataError(
                f"row {record.id} begins with {self.tokenizer.bos_token} twice: {source}", where, "Remove one of them."
            )


def _hides(segments: list[Segment]) -> bool:
    return any(OPEN in segment.text for segment in segments)


def _difference(expected: str, found: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    return f"the prompt goes on with {expected[same : same + 30]!r}, the conversation with {found[same : same + 30]!r}"
