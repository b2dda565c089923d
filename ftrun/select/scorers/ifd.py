"""Instruction-following difficulty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Scorer, Table
from ftrun.select.scoring import segments
from ftrun.select.texts import Turns, read_turns

if TYPE_CHECKING:
    from ftrun.context import Context
    from ftrun.data.pool import Pool


@register("select", "ifd")
@dataclass
class Ifd(Scorer):
    """How little the instruction helps with the answer (Li et al., 2024, "Cherry LLM", arXiv:2308.12032).

    IFD = mean nll of the response given the prompt / mean nll of the response after "### Response:" alone, over the
    same response tokens. Rows above 1, where the prompt hurts, are left out; the highest of the rest are taken.
    A row with several answers gets the mean over its answers, each given all turns before it.
    """

    ratio: Literal["loss", "ppl"] = "loss"  # ratio of mean losses, or of their exponentials
    template: Literal["alpaca", "plain", "chat"] = "alpaca"  # layout of the prompt; chat: the tokenizer's own template
    max_length: int = 512  # tokens of prompt and response that are scored

    column: ClassVar[str] = "ifd"
    passes: ClassVar[float] = 2.0  # with and without the prompt: at most

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Difficulty and its two sides, (rows,) each; NaN where a row has no response that can be scored.

        With ``ratio=ppl`` the two sides are perplexities.
        """
        turns = read_turns(pool, ctx, self.template)
        rooms = [max(0, self.max_length - len(prompt)) for prompt in turns.prompt]
        kept = [response[:room] for response, room in zip(turns.response, rooms, strict=True)]
        conditional = ctx.scorer.mean_nll(segments(zip(turns.prompt, kept, strict=True)), "score responses with prompt")
        direct = ctx.scorer.mean_nll(segments(self.direct(turns, rooms)), "score responses alone")
        conditional[np.array(rooms) == 0] = np.nan  # a full prompt leaves nothing to compare
        direct[np.isnan(conditional)] = np.nan
        self._explain(turns, rooms, conditional, direct, len(pool), ctx)
        if self.ratio == "ppl":
            conditional, direct = np.exp(conditional), np.exp(direct)
        conditional[np.isnan(direct)] = np.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = {"ifd": conditional / direct, "conditional": conditional, "direct": direct}
        return {name: turns.row_mean(values, len(pool)) for name, values in columns.items()}

    def direct(self, turns: Turns, rooms: list[int]) -> list[tuple[list[int], list[int]]]:
        """Context and targets of the pass without the prompt; ``rooms`` are the response tokens that the prompt leaves."""
        return [(turns.answer_mark, response[:room]) for response, room in zip(turns.response, rooms, strict=True)]

    def keep(self, table: Table) -> np.ndarray:
        """Exactly 1, a prompt that changes nothing, stays."""
        return table.columns["ifd"] <= 1

    def _explain(
        self, turns: Turns, rooms: list[int], conditional: np.ndarray, direct: np.ndarray, rows: int, ctx: Context
    ) -> None:
        """Say why rows stay without a score, and how many were scored in part."""
        reasons = dict.fromkeys(range(rows), "no response")
        cut = 0
        for index, row in enumerate(turns.row.tolist()):
            cut += 0 < rooms[index] < len(turns.response[index])
            if not np.isnan(direct[index]):
                reasons[row] = ""
            elif reasons[row] == "no response":
                full = rooms[index] == 0
                reasons[row] = (
                    f"the prompt fills max_length={self.max_length}"
                    if full
                    else "a one-token response has no direct loss"
                )
        ctx.scorer.reasons |= {row: reason for row, reason in reasons.items() if reason}
        if cut:
            ctx.report.note(f"{cut} of {len(rooms)} responses are scored up to max_length={self.max_length} only")
