"""How surprising the answers are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.registry import register
from ftrun.select.base import Scorer
from ftrun.select.scoring.texts import read_turns
from ftrun.training.scoring import segments

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context


@register("select", "ppl_response")
@dataclass
class PplResponse(Scorer):
    """Perplexity of the response given its prompt, a baseline (Xia et al., 2024, arXiv:2410.09335).

    ``loss`` = mean nll of the response tokens, ``ppl`` = exp(loss); ``ppl_response`` is what is ranked: ppl where the
    surprising rows are wanted, -ppl where the familiar ones are, -|loss - median of the pool| where neither.
    A row with several answers gets the mean over its answers, each given all turns before it.
    """

    side: Literal["highest", "lowest", "middle"] = "highest"  # rows wanted: surprising, familiar, or in between
    template: Literal["alpaca", "plain", "chat"] = "chat"  # layout of the prompt; chat: the tokenizer's own template
    max_length: int = 1024  # tokens of prompt and response that are scored

    column: ClassVar[str] = "ppl_response"
    passes: ClassVar[float] = 1.0

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Loss, perplexity and rank value, (rows,) each; NaN for a row without a response that can be scored."""
        turns = read_turns(pool, ctx, self.template)
        kept = [y[: max(0, self.max_length - len(x))] for x, y in zip(turns.prompt, turns.response, strict=True)]
        losses = ctx.scorer.mean_nll(segments(zip(turns.prompt, kept, strict=True)), "score responses")
        loss, ppl = turns.row_mean(losses, len(pool)), turns.row_mean(np.exp(losses), len(pool))
        has_turn = np.isin(np.arange(len(pool)), turns.row)
        for row in np.flatnonzero(np.isnan(loss)).tolist():
            ctx.scorer.reasons[row] = (
                f"the prompt fills max_length={self.max_length}" if has_turn[row] else "no response"
            )
        cut = sum(len(part) < len(whole) for part, whole in zip(kept, turns.response, strict=True))
        if cut:
            ctx.report.note(f"{cut} of {len(kept)} responses are scored up to max_length={self.max_length} only")
        return {"ppl_response": self._wanted(loss, ppl), "ppl": ppl, "loss": loss}

    def _wanted(self, loss: np.ndarray, ppl: np.ndarray) -> np.ndarray:
        if self.side == "middle":
            return -np.abs(loss - (np.nanmedian(loss) if np.isfinite(loss).any() else 0))
        return ppl.copy() if self.side == "highest" else -ppl
