"""The beginning of the answer is shown in the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy, edited_row

if TYPE_CHECKING:
    from ftrun.data.records import Message, Record
    from ftrun.training.context import Context


@register("tokens", "lookahead_tuning")
@dataclass
class LookaheadTuning(TokenPolicy):
    """Shows where an answer begins, so that learning it changes little there (Liu et al., 2025, arXiv:2503.19041).

    real: the user's turn gets ``connector`` and the first ``m`` tokens of its answer; the answer stays as it is.
    virtual: the user's turn gets ``connector`` and ``preview``, and the answer begins with ``preview``. Shown tokens
    stay in the loss, which is small for them. Rows to evaluate on are not edited, and no prompt needs the preview.
    """

    mode: Literal["real", "virtual"] = "real"  # show the answer's own beginning, or a fixed one that it then gets
    m: int = 6  # tokens of the answer that are shown (real); 0 leaves the rows as they are
    connector: str = " The answer begins with: "  # stands between the prompt and what is shown
    preview: str = "Let's solve this problem. "  # the fixed beginning (P; virtual)

    edits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.m < 0:
            raise ConfigError("tokens.m is a number of tokens, 0 or more", f"tokens.m={self.m}")
        if self.mode == "virtual" and not self.preview.strip():
            raise ConfigError("tokens.mode=virtual shows tokens.preview, which is empty", "tokens.preview")

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        from ftrun.models.load import load_tokenizer

        tokenizer = load_tokenizer(ctx.settings.model) if self.mode == "real" else None
        last_only = ctx.settings.data.train_on == "last_response"
        untouched = 0
        for record in records:
            messages = self.with_previews(record.messages, tokenizer, last_only)
            untouched += messages == list(record.messages)
            yield edited_row(record, messages)
        if untouched and (self.mode == "virtual" or self.m > 0):
            ctx.report.warn(
                f"{untouched} rows have no trained answer right after a user's turn: nothing is shown there"
            )

    def with_previews(self, messages: Iterable[Message], tokenizer: Any, last_only: bool = False) -> list[Message]:
        """The conversation with a preview in every user turn that an answer follows, or in that of the last answer."""
        edited = list(messages)
        for at in range(max(1, len(edited) - 1) if last_only else 1, len(edited)):
            asked, answer = edited[at - 1], edited[at]
            if (asked.role, answer.role) != ("user", "assistant"):
                continue
            if self.mode == "virtual":
                edited[at] = replace(answer, content=self.preview + answer.content)
                shown = self.preview
            else:
                shown = beginning(answer.content, self.m, tokenizer)
            if shown:
                edited[at - 1] = replace(asked, content=asked.content + self.connector + shown)
        return edited


def beginning(text: str, tokens: int, tokenizer: Any) -> str:
    """The first tokens of a text, as the part of it that they stand for: whole characters, at most the whole text."""
    if tokens == 0:
        return ""
    if tokenizer.is_fast:
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        return text[: max((end for _, end in spans[:tokens]), default=0)]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    shown = tokenizer.decode(ids[:tokens])
    return text[: next((at for at, pair in enumerate(zip(shown, text, strict=False)) if len({*pair}) > 1), len(shown))]
