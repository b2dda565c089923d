"""Training on the use of tools: no failed calls, and weight where a call is decided."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftrun.data.calls import Call, read_call, tools_of
from ftrun.data.records import Message, Record, answers
from ftrun.data.render import Renderer
from ftrun.data.turns import messages_of
from ftrun.errors import ComponentError, ConfigError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy, edited_row
from ftrun.tokens.edited import edited_rows

if TYPE_CHECKING:
    from ftrun.data.tokens import TokenTable
    from ftrun.training.context import Context


@register("tokens", "tl_training")
@dataclass
class TlTraining(TokenPolicy):
    """Leaves out calls of tools that failed, and weighs the tokens that choose the tool (Ye et al., 2025, arXiv:2412.15495).

    MAE: every turn of the assistant becomes a row, with all before it as context. It is left out if a message follows
    that is no tool's output, or one that holds an error; it stays in the context of later rows.
    PKT: of the reply, K is the first token of the tool's name and, for each other tool whose name begins alike, the
    first token that tells them apart; P is the last token of every argument; O is the rest. With
    ``w = min(|O| / |K|, max_weight)`` for ``|K| < |O|``, else 1, the loss of a reply is
    ``(w * sum_K + sum_P + sum_O) / (w * |K| + |P| + |O|)``. Replies without a call are trained plainly.
    """

    max_weight: float = 9.0  # highest weight of a token in K; 1 weighs all alike
    errors: list[str] = field(
        default_factory=lambda: [
            "error",
            "is not defined",
            "positional argument",
            "unexpected keyword",
            "not supported",
            "invalid api call",
            "is not json serializable",
            "slice indices must be integers",
        ]
    )  # a tool's output with one of these has failed; only letters and digits are compared, in small letters

    needs: ClassVar[dict[str, str]] = {"token_loss": "weighs single tokens of the loss"}
    edits: ClassVar[bool] = True
    edits_heldout: ClassVar[bool] = True  # every turn of a held-out dialogue is a case of its own
    static: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.max_weight < float("inf"):
            raise ConfigError(
                f"tokens.max_weight must be at least 1, not {self.max_weight}", f"tokens.max_weight={self.max_weight}"
            )
        for pattern in self.errors:
            if not squeezed(pattern):
                raise ConfigError(f"tokens.errors holds {pattern!r}, which is in every output", "tokens.errors")

    # ---- MAE: which turns are trained ----

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        """A row for every turn of the assistant that is worth learning."""
        counted: Counter[str] = Counter()
        for record in records:
            for turn, message in enumerate(record.messages):
                if message.weight == 0 or turn not in answers(record.messages):
                    continue
                fate = self.fate(record.messages[turn + 1 :])
                counted[fate] += 1
                if fate == "kept":
                    yield edited_row(record, record.messages[: turn + 1])
        ctx.facts["tl_training_turns"] = dict(counted)
        ctx.report.note(
            f"{counted['kept']} of {counted.total()} turns are trained; {counted['failed']} were followed by an error, "
            f"{counted['no output']} by something else than a tool's output"
        )

    def fate(self, following: tuple[Message, ...]) -> str:
        """``kept``, or why a turn with these messages after it is not trained: ``no output`` of a tool, or ``failed``."""
        if not following:
            return "kept"
        if following[0].role != "tool":
            return "no output"
        output = squeezed(following[0].content)
        return "failed" if any(squeezed(pattern) in output for pattern in self.errors) else "kept"

    # ---- PKT: how much their tokens weigh ----

    def precompute(self, table: TokenTable, ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the last reply of every row, which add up to its number of tokens; score w in K, 1 elsewhere."""
        if ctx.bundle is None:
            raise ComponentError("tl_training looks for calls among the tokens, and no model is loaded")
        tokenizer, rows = ctx.bundle.tokenizer, edited_rows(ctx)
        renderer = Renderer(tokenizer)
        scores, weights = np.full(len(table.input_ids), np.nan), np.zeros(len(table.input_ids), np.float32)
        counted: Counter[str] = Counter()
        for index in range(len(table)):
            row, item = rows[int(table.record[index])], table.sequence(index)
            turns = messages_of(row)
            record = Record(item.record, "sft", turns, fields=row)
            first = len(renderer.prompt_ids(record))
            reply = first + np.flatnonzero(np.asarray(item.loss_weight[first:]) > 0)
            raw = np.ones(len(reply))
            keys, last = self._places(record, tokenizer, item.input_ids[reply].tolist(), counted)
            others = len(reply) - len(keys | last)
            if keys and len(keys) < others:
                raw[sorted(keys)] = min(others / len(keys), self.max_weight)  # w
            start = int(table.offsets[index])
            scores[start + reply] = raw
            weights[start + reply] = raw * len(raw) / raw.sum()  # the loss divides by the tokens: so by sum(w)
        ctx.facts["tl_training_replies"] = dict(counted)
        ctx.report.note(
            f"{counted['call']} of {len(table)} replies hold a call, {counted['alike']} of them of a tool whose name "
            f"begins like another's; {counted['none']} hold none that can be read, {counted['lost']} cannot be found "
            "among the tokens: both are trained plainly"
        )
        if not counted["call"]:
            ctx.report.warn(
                "no reply holds a call: nothing is weighed. Calls are name(key=value) or JSON with name and arguments"
            )
        return scores, weights

    def _places(
        self, record: Record, tokenizer: Any, ids: list[int], counted: Counter[str]
    ) -> tuple[set[int], set[int]]:
        """Tokens of the reply that are in K and in P."""
        call = read_call(record.response)
        if call is None:
            counted["none"] += 1
            return set(), set()

        def text(tokens: int) -> str:
            """What the first tokens of the reply stand for."""
            return tokenizer.decode(ids[:tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False)

        body = record.response.strip()  # a template may strip it too
        start = text(len(ids)).find(body)
        if start < 0:
            counted["lost"] += 1
            return set(), set()
        counted["call"] += 1
        choices = branches(call, list(tools_of(record)))
        counted["alike"] += len(choices) > 1

        def token(character: int) -> int:
            place = start + character - record.response.index(body)
            return min(bisect_right(range(len(ids)), place, key=lambda n: len(text(n + 1))), len(ids) - 1)

        keys = {token(place) for place in choices}
        return keys, {token(place) for place in call.last} - keys


def branches(call: Call, tools: list[str]) -> list[int]:
    """Characters at which the choice of the tool is made: its first, and where another's name parts from it."""
    shared = {_shared(call.name, other) for other in tools if other != call.name}
    return [call.name_start + length for length in sorted(shared | {0})]


def _shared(name: str, other: str) -> int:
    """Length of the common beginning."""
    return next((n for n, (a, b) in enumerate(zip(name, other, strict=False)) if a != b), min(len(name), len(other)))


def squeezed(text: str) -> str:
    """Letters and digits only, in small letters."""
    return re.sub(r"[\W_]", "", text).lower()
