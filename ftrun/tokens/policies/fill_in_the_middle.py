"""Texts cut in three and reordered, so that a model learns to fill in their middle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ftrun.data.records import Record
from ftrun.errors import ConfigError, DataError
from ftrun.models.load import load_tokenizer
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.edited import edited_rows, token_ends

if TYPE_CHECKING:
    from ftrun.data.tokens import TokenTable
    from ftrun.training.context import Context

# tokens before prefix, suffix and middle, by family: StarCoder, Qwen and Gemma, DeepSeek
KNOWN_MARKERS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
HORIZON = "horizon"


@register("tokens", "fill_in_the_middle")
@dataclass
class FillInTheMiddle(TokenPolicy):
    """Prefix, suffix, then the middle (Bavarian et al., 2022, arXiv:2207.14255), with the middle's horizon.

    With probability ``fim_rate`` a text is cut at two random characters and becomes ``<pre> prefix <suf> suffix
    <mid> middle``; the end-of-text token closes it. Every token of the middle, the end included, remembers its horizon
    ``y_t = (M - t) / M``, t = 1..M: the share of the middle that is still to come (Ding et al., 2024,
    arXiv:2410.03103), for objective=horizon_length. All tokens are trained. A text that was split or cut for its
    length has no horizon: where it ends is not known.
    """

    fim_rate: float = 0.5  # share of the texts that are reordered
    markers: list[str] | None = None  # what stands before prefix, suffix and middle; null: the tokenizer's own tokens
    apply_to: Literal["fim", "fim+l2r"] = "fim"  # texts whose tokens have a horizon: reordered ones, or plain ones too

    edits: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.fim_rate <= 1:
            raise ConfigError("tokens.fim_rate is a share from 0 to 1", f"tokens.fim_rate={self.fim_rate:g}")
        if self.markers is not None and (len(self.markers) != 3 or not all(self.markers)):
            raise ConfigError(
                "tokens.markers are three texts: before the prefix, the suffix and the middle",
                f"tokens.markers={self.markers}",
                "For example tokens.markers=['<PRE>','<SUF>','<MID>'].",
            )

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        """Rows of text; ``middle`` is the character at which the part with a horizon begins, null where there is none."""
        markers = self._markers(ctx)
        for record in records:
            if record.kind != "text":
                raise DataError(
                    f"tokens=fill_in_the_middle reorders plain texts; these are {record.kind} rows",
                    f"data.path={ctx.settings.data.path}",
                    "Use rows with a text, and objective=horizon_length or objective=text.",
                )
            seed = hashlib.blake2b(record.text.encode(), digest_size=8).digest()
            random = np.random.default_rng([ctx.seed, int.from_bytes(seed, "big")])
            if random.random() < self.fim_rate:
                text, middle = reordered(record.text, random, markers)
            else:
                text, middle = record.text, 0 if self.apply_to == "fim+l2r" else None
            yield {"text": text, "row": record.id, "middle": middle}

    def remember(self, table: TokenTable, ctx: Context) -> dict[str, np.ndarray]:
        """``horizon``: y_t of the tokens of the middle, (tokens,), NaN elsewhere."""
        assert ctx.bundle is not None
        tokenizer, rows = ctx.bundle.tokenizer, edited_rows(ctx)
        found = np.full(len(table.input_ids), np.nan)
        incomplete = 0
        for index in range(len(table)):
            row = rows[int(table.record[index])]
            if row["middle"] is None:
                continue
            start, end = int(table.offsets[index]), int(table.offsets[index + 1])
            horizon = horizon_of(tokenizer, row["text"], row["middle"], np.asarray(table.input_ids[start:end]))
            if horizon is None:
                incomplete += not table.continues[index]
            else:
                found[start:end] = horizon
        if incomplete:
            ctx.report.warn(
                f"{incomplete:,} texts were split or cut at data.max_length: their tokens have no horizon; raise data.max_length"
            )
        return {HORIZON: found}

    def _markers(self, ctx: Context) -> tuple[str, ...]:
        if self.markers is not None:
            return tuple(self.markers)
        known = load_tokenizer(ctx.settings.model).get_vocab()
        for markers in KNOWN_MARKERS:
            if all(marker in known for marker in markers):
                return markers
        ctx.report.warn(
            f"the tokenizer has no tokens for filling in the middle: the plain texts {', '.join(KNOWN_MARKERS[0])} stand for "
            "them; choose others with tokens.markers"
        )
        return KNOWN_MARKERS[0]


def reordered(text: str, random: np.random.Generator, markers: tuple[str, ...]) -> tuple[str, int]:
    """``<pre> prefix <suf> suffix <mid> middle``, and the character at which the middle begins."""
    first, last = np.sort(random.integers(0, len(text) + 1, size=2)).tolist()
    before, after, at = markers
    head = f"{before}{text[:first]}{after}{text[last:]}{at}"
    return head + text[first:last], len(head)


def horizon_of(tokenizer: Any, text: str, middle: int, ids: np.ndarray) -> np.ndarray | None:
    """y_t of every token of one text, (tokens,), NaN before the middle; None where ``ids`` are not the whole text.

    A token that holds the end of the marker and the start of the middle belongs to the middle.
    """
    ends = token_ends(tokenizer, text, ids, special=True)
    if ends is None:  # the end of text is not written in it
        ends = token_ends(tokenizer, text, ids[:-1], special=True)
        if ends is None or ids[-1] != tokenizer.eos_token_id:
            return None
        ends = np.append(ends, -1)
    inside = np.flatnonzero(ends > middle)
    first = int(inside[0]) if len(inside) else len(ids) - 1
    horizon = np.full(len(ids), np.nan)
    m = len(ids) - first  # M
    horizon[first:] = (m - np.arange(1, m + 1)) / m
    return horizon
