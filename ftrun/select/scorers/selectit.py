"""The model rates the rows itself, and its doubts count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Scorer
from ftrun.select.scoring.next_token import chat_prompt, next_token, word_ids
from ftrun.select.scoring.texts import Turns, assistant_turns, encode

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context

RATING_PROMPTS = (
    "Rate how well the response carries out the instruction. Give a whole number from 1, very badly, to 5, very well.",
    "You judge training examples for an assistant. Grade the example below: 1 is worthless, 5 is excellent.",
    "Is the response correct, complete and clear? Answer with a score between 1 (not at all) and 5 (fully).",
    "Suppose a careful teacher reads this exchange. Which mark from 1 (poor) to 5 (outstanding) does the response get?",
    "Judge the quality of the pair of instruction and response on a scale of five points, where 5 is best.",
)
ANSWER = "Write the number only."
DIGITS = "12345"


@register("select", "selectit")
@dataclass
class SelectIt(Scorer):
    """Self-rating with uncertainty (Liu et al., 2024, "SelectIT", arXiv:2402.16705).

    Five rating prompts ask the scoring model for a digit from 1 to 5. With p its probabilities of the digits as the
    next token and q = softmax(p / sum p), one prompt gives

        s = (argmax q) * mean over the other digits k of (q_max - q_k)

    and the row mean(s) / (1 + alpha * std(s)) over the prompts: from 0 to 5 (e - 1) / (e + 4) = 1.28. A row with several
    answers gets the mean over its answers, each rated with all turns before it.
    """

    alpha: float = 0.2  # how much disagreement of the prompts counts against a row
    prompts: int = 5  # rating prompts that are asked, at most 5
    max_length: int = 1024  # tokens of instruction and response that the model gets to read

    column: ClassVar[str] = "selectit"

    def __post_init__(self) -> None:
        if not 1 <= self.prompts <= len(RATING_PROMPTS):
            what = f"there are {len(RATING_PROMPTS)} rating prompts, of which at least 1 is asked"
            raise ConfigError(what, f"select.prompts={self.prompts}")
        if self.alpha < 0:
            raise ConfigError("disagreement cannot count for a row", f"select.alpha={self.alpha:g}", "Use 0 or more.")

    def planned_tokens(self, lengths: np.ndarray) -> float:
        return float(lengths.sum()) * self.prompts

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Rating with its mean and spread over the prompts, (rows,) each; NaN for a row without a response."""
        tokenizer = ctx.scorer.bundle.tokenizer
        rows, pairs = self._pairs(pool, ctx)
        asked = RATING_PROMPTS[: self.prompts]
        texts = [
            chat_prompt(tokenizer, f"{question} {ANSWER}", f"Instruction:\n{instruction}\n\nResponse:\n{response}")
            for question in asked
            for instruction, response in pairs
        ]
        digits = [word_ids(tokenizer, digit) for digit in DIGITS]
        found = next_token(texts, digits, ctx, "rate rows").asked
        ratings = rating(found.reshape(len(asked), len(pairs), len(DIGITS)))
        mean, spread = ratings.mean(0), ratings.std(0)
        turns = Turns(np.array(rows, np.int64), [], [], [])
        columns = {"selectit": mean / (1 + self.alpha * spread), "rating": mean, "rating_std": spread}
        return {name: turns.row_mean(values, len(pool)) for name, values in columns.items()}

    def _pairs(self, pool: Pool, ctx: Context) -> tuple[list[int], list[tuple[str, str]]]:
        """Row and texts of every answer that is rated; long answers cut."""
        tokenizer = ctx.scorer.bundle.tokenizer
        rows: list[int] = []
        pairs: list[tuple[str, str]] = []
        cut = 0
        reasons = dict.fromkeys(range(len(pool)), "no response")
        for row, record in enumerate(pool):
            for before, answer in assistant_turns(record):
                instruction = "\n\n".join(message.content for message in before)
                asked, said = encode(tokenizer, [instruction, answer])
                room = self.max_length - len(asked)
                if room <= 0:
                    reasons[row] = f"the prompt fills max_length={self.max_length}"
                    continue
                if len(said) > room:
                    answer, cut = tokenizer.decode(said[:room]), cut + 1
                rows.append(row)
                pairs.append((instruction, answer))
        rated = set(rows)
        ctx.scorer.reasons |= {row: reason for row, reason in reasons.items() if row not in rated}
        if cut:
            ctx.report.note(f"{cut} of {len(pairs)} responses are rated up to max_length={self.max_length} only")
        return rows, pairs


def rating(probabilities: np.ndarray) -> np.ndarray:
    """Rating from the probabilities of the digits 1 to K in the last axis, (..., K) -> (...,)."""
    share = probabilities / np.maximum(probabilities.sum(-1, keepdims=True), 1e-300)
    q = np.exp(share) / np.exp(share).sum(-1, keepdims=True)
    best = q.max(-1)
    others = (best[..., None] - q).sum(-1) / (q.shape[-1] - 1)  # the best itself adds 0
    return (q.argmax(-1) + 1) * others
