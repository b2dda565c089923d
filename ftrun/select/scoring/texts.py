"""Rows as the texts that selectors score: every assistant turn with what stands before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ftrun.data.chat import ChatTemplate
from ftrun.data.formats import renamed
from ftrun.data.literals import OPEN, Unspellable
from ftrun.data.ragged import Ragged
from ftrun.data.records import Message, Record, answers
from ftrun.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ftrun.training.context import Context

Form = Literal["alpaca", "plain", "chat", "question"]

ALPACA_HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
ALPACA_HEAD_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_ANSWER = "### Response:"  # no line break: the response follows at once


TURNS = 4096  # tokenised at a time


@dataclass
class Turns:
    """Assistant turns of a pool as token ids, special tokens in front included."""

    row: np.ndarray  # (turns,) position of the row in the pool
    prompt: Sequence[list[int]]
    response: Sequence[list[int]]  # no special tokens
    answer_mark: list[int]  # what introduces an answer when there is no prompt: "### Response:" or a chat header

    def row_mean(self, values: np.ndarray, rows: int) -> np.ndarray:
        """Mean over the turns of each row that have a value, (rows,); NaN where none has."""
        known = ~np.isnan(values)
        count = np.bincount(self.row[known], minlength=rows)
        total = np.bincount(self.row[known], weights=values[known], minlength=rows)
        return np.divide(total, count, out=np.full(rows, np.nan), where=count > 0)

    @property
    def starts(self) -> np.ndarray:
        """Tokens that the turns before it in its row have, prompts included, (turns,)."""
        sizes = np.array([len(x) + len(y) for x, y in zip(self.prompt, self.response, strict=True)], np.int64)
        before = np.cumsum(sizes) - sizes
        _, first, number = np.unique(self.row, return_index=True, return_inverse=True)
        return before - before[first[number]]


def read_turns(pool: Iterable[Record], ctx: Context, form: Form) -> Turns:
    """Tokenise every assistant turn of the pool, prompt and response apart.

    Apart, because both passes of a comparison must score the same response tokens; a tokenizer that reads prompt and
    response in one go may merge across the seam.
    """
    tokenizer = ctx.scorer.bundle.tokenizer
    chat = ChatTemplate(tokenizer)
    columns = ctx.settings.data.columns
    rows: list[int] = []
    prompts, responses = Ragged(), Ragged()
    lead = [] if form == "chat" else added_ids(tokenizer)[0]  # a chat template writes its own

    def turns() -> Iterator[tuple[str, str]]:
        for position, record in enumerate(pool):
            for before, answer in assistant_turns(record):
                rows.append(position)
                yield _prompt(record, before, form, chat, columns), chat.literals.hide(answer)

    rest = turns()
    while piece := list(islice(rest, TURNS)):
        for ids in _spelled(chat, [prompt for prompt, _ in piece]):
            prompts.append(lead + ids)
        for ids in _spelled(chat, [answer for _, answer in piece]):
            responses.append(ids)
    mark = {"alpaca": ALPACA_ANSWER, "chat": _chat_header(tokenizer) if form == "chat" else ""}.get(form, "")
    return Turns(np.array(rows, np.int64), prompts, responses, lead + encode(tokenizer, [mark])[0])


def assistant_turns(record: Record) -> Iterator[tuple[tuple[Message, ...], str]]:
    """Every answer that says something and is trained, with the messages before it; of a preference pair the chosen side."""
    messages = (*record.messages, *record.chosen)
    for index in answers(messages):
        if messages[index].text and messages[index].weight != 0:
            yield messages[:index], messages[index].text


def _spelled(chat: ChatTemplate, texts: list[str]) -> list[list[int]]:
    """Token ids of each text; control tokens hidden in it are spelled, where the tokenizer can."""
    found = encode(chat.tokenizer, [chat.literals.show(text) for text in texts])
    for number, text in enumerate(texts):
        if OPEN in text:
            with contextlib.suppress(Unspellable):  # training refuses the row, or leaves it out
                found[number] = chat.literals.ids(text)
    return found


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    return tokenizer(texts, add_special_tokens=False).input_ids if texts else []


def added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text by itself: a BOS, or nothing; [CLS] and [SEP] of an encoder.

    Having a BOS token does not mean adding it.
    """
    plain = tokenizer("a", add_special_tokens=False).input_ids
    dressed = tokenizer("a").input_ids
    starts = (start for start in range(len(dressed)) if dressed[start : start + len(plain)] == plain)
    start = next(starts, 0)
    return dressed[:start], dressed[start + len(plain) :]


def _prompt(
    record: Record, before: tuple[Message, ...], form: Form, chat: ChatTemplate, columns: dict[str, str]
) -> str:
    """What stands before an answer, control tokens that messages spell hidden in it."""
    if form == "chat":
        return _chat_text(record, before, True, chat, "alpaca or plain")
    return chat.literals.hide(_layout(record, before, form, columns))


def _layout(record: Record, before: tuple[Message, ...], form: Form, columns: dict[str, str]) -> str:
    if form == "question":
        return _question_prompt(before)
    instruction, given = _alpaca_fields(record, columns) if len(before) == 1 else ("", "")
    if form == "plain":
        parts = [instruction, given] if instruction else [message.content for message in before]
        return "".join(part + "\n" for part in parts if part)
    if instruction:
        head, body = (ALPACA_HEAD_WITH_INPUT, f"### Input:\n{given}\n\n") if given else (ALPACA_HEAD, "")
        return f"{head}### Instruction:\n{instruction}\n\n{body}{ALPACA_ANSWER}"
    return _alpaca_conversation(before)


def _alpaca_conversation(before: tuple[Message, ...]) -> str:
    """Earlier turns in the same layout; a system prompt takes the place of the head."""
    text = "".join(message.content + "\n\n" for message in before if message.role == "system") or ALPACA_HEAD
    for message in before:
        if message.role == "assistant":
            text += f"{ALPACA_ANSWER}{message.content}\n\n"
        elif message.role != "system":
            text += f"### Instruction:\n{message.content}\n\n"
    return text + ALPACA_ANSWER


def _question_prompt(before: tuple[Message, ...]) -> str:
    """Question and answer in lines of their own; a system prompt comes before the first question."""
    heads = {"user": "Question:\n", "assistant": "Answer:\n"}
    return "".join(f"{heads.get(message.role, '')}{message.content}\n\n" for message in before) + "Answer:\n"


def _alpaca_fields(record: Record, columns: dict[str, str]) -> tuple[str, str]:
    """Instruction and input where the row was read from an alpaca layout without a system prompt, else empty texts."""
    view = renamed(record.fields, columns)
    instruction = view.get("instruction")
    if not isinstance(instruction, str) or record.messages[0].role == "system":
        return "", ""
    return instruction, str(view.get("input") or view.get("context") or "")


def chat_text(record: Record, messages: tuple[Message, ...], asks: bool, tokenizer: Any, others: str) -> str:
    """Messages of a row in the tokenizer's own layout; ``asks`` adds what introduces an answer.

    Raises DataError where the template refuses them; ``others`` are the layouts to try instead.
    """
    chat = ChatTemplate(tokenizer)
    return chat.literals.show(_chat_text(record, messages, asks, chat, others))


def _chat_text(record: Record, messages: tuple[Message, ...], asks: bool, chat: ChatTemplate, others: str) -> str:
    try:
        return chat.conversation(messages, record.tools).text(len(messages), asks)
    except (DataError, ConfigError) as error:
        raise DataError(
            "the chat template cannot render a row",
            f"row {record.id}: {error.what}",
            f"Use select.template={others}.",
        ) from None


def _chat_header(tokenizer: Any) -> str:
    """What the chat template adds to ask for an answer."""
    message = [{"role": "user", "content": "a"}]
    bare = tokenizer.apply_chat_template(message, tokenize=False)
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).removeprefix(bare)
