"""Hard questions with long reasoning."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.data.answers import check_of
from ftrun.data.render import Renderer
from ftrun.errors import ConfigError, DataError
from ftrun.registry import register
from ftrun.select.base import Scorer
from ftrun.select.scoring.next_token import chat_prompt, next_token, word_ids
from ftrun.select.scoring.texts import encode
from ftrun.select.trials.rollouts import rollouts

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.data.records import Record
    from ftrun.training.context import Context

JUDGE = (
    "You judge how difficult a question is. Answer 1 if solving it takes hard, many-step reasoning, and 0 if it does "
    "not. Write the digit only."
)
TRACE = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)


@register("select", "select2reason")
@dataclass
class Select2Reason(Scorer):
    """Difficulty and length of the reasoning in one rank (Yang et al., 2025, "Select2Reason", arXiv:2505.17266).

        score = w * rank(difficulty) + (1 - w) * rank(length), ranks from 0 (lowest) to 1

    Length counts the tokens of the reasoning trace, what stands between <think> and </think>, else the whole last
    answer, without the steps (lines) that repeat an earlier one exactly, so that loops do not score.
    Difficulty is one of: judge, the scoring model's P("1") / (P of its two likeliest tokens) when asked whether the
    question is hard, 0 where "1" is not among the two; pass_rate, 1 - the share of rollouts that the row's verifier or
    its field "answer" finds right; column, a field of the rows. Equal values share a rank.
    """

    w: float = 0.25  # weight of difficulty; 0 ranks by length alone
    difficulty: Literal["judge", "pass_rate", "column"] = "judge"  # where difficulty comes from
    field: str = "difficulty"  # field of the rows that says how hard they are, for difficulty=column
    rollouts: int = 8  # answers that the model writes to every question, for difficulty=pass_rate
    max_new_tokens: int = 512  # longest of these answers, in tokens
    temperature: float = 1.0  # they are drawn at
    max_length: int = 2048  # longest question that the model gets to read, in tokens

    column: ClassVar[str] = "select2reason"

    def __post_init__(self) -> None:
        if not 0 <= self.w <= 1:
            raise ConfigError("a weight lies between 0 and 1", f"select.w={self.w:g}")
        for name in ("rollouts", "max_new_tokens", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"select.{name} must be at least 1", f"select.{name}={getattr(self, name)}")
        if self.temperature < 0:
            raise ConfigError("a temperature cannot be negative", f"select.temperature={self.temperature:g}")

    def planned_tokens(self, lengths: np.ndarray) -> float:
        written = {"judge": 0, "pass_rate": self.rollouts * self.max_new_tokens, "column": 0}[self.difficulty]
        return float(lengths.sum()) * (self.difficulty != "column") + len(lengths) * written

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Joint rank, difficulty and length, (rows,) each; NaN for a row without question, answer or difficulty."""
        length = self._lengths(pool, ctx)
        measured = {"judge": self._judged, "pass_rate": self._failed, "column": self._given}
        difficulty = measured[self.difficulty](pool, ctx, ~np.isnan(length))
        known = ~np.isnan(length) & ~np.isnan(difficulty)
        joint = np.full(len(pool), np.nan)
        joint[known] = self.w * rank_share(difficulty[known]) + (1 - self.w) * rank_share(length[known])
        return {"select2reason": joint, "difficulty": difficulty, "length": length}

    def _lengths(self, pool: Pool, ctx: Context) -> np.ndarray:
        """Tokens of every trace without repeated steps, (rows,); NaN without a question and an answer."""
        traces = [without_repeats(trace_of(record.response)) for record in pool]
        length = np.array([len(ids) for ids in encode(ctx.scorer.tokenizer, traces)], float)
        for row, record in enumerate(pool):
            if not record.response or not question_of(record):
                length[row] = np.nan
                ctx.scorer.reasons[row] = "no response" if not record.response else "no question"
        return length

    def _judged(self, pool: Pool, ctx: Context, wanted: np.ndarray) -> np.ndarray:
        tokenizer = ctx.scorer.bundle.tokenizer
        ones = word_ids(tokenizer, "1")
        rows, prompts = [], []
        for row in np.flatnonzero(wanted).tolist():
            ids = chat_prompt(tokenizer, JUDGE, question_of(pool[int(pool.ids[row])]))
            if len(ids) > self.max_length:
                ctx.scorer.reasons[row] = f"the question is longer than max_length={self.max_length}"
                continue
            rows.append(row)
            prompts.append(ids)
        difficulty = np.full(len(pool), np.nan)
        found = next_token(prompts, [ones], ctx, "judge difficulty")
        difficulty[rows] = share_of_top(found.top, found.top_ids, ones)
        return difficulty

    def _failed(self, pool: Pool, ctx: Context, wanted: np.ndarray) -> np.ndarray:
        bundle = ctx.scorer.bundle
        renderer = Renderer(bundle.tokenizer)
        rows, prompts, checks = [], [], []
        for row in np.flatnonzero(wanted).tolist():
            id = int(pool.ids[row])
            record, where = pool[id], pool.origin(id)
            if record.answer is None and not record.verifier:  # no rollout repeats a whole trace to the letter
                ctx.scorer.reasons[row] = "no verifier, and no answer to compare rollouts with"
                continue
            ids = renderer.prompt_ids(record, where)
            if len(ids) > self.max_length:
                ctx.scorer.reasons[row] = f"the question is longer than max_length={self.max_length}"
                continue
            rows.append(row)
            prompts.append(ids)
            checks.append(check_of(record, "auto", where))
        written = rollouts(prompts, self.rollouts, self.max_new_tokens, self.temperature, ctx)
        difficulty = np.full(len(pool), np.nan)
        for row, check, answers in zip(rows, checks, written, strict=True):
            difficulty[row] = 1 - np.mean([check.score(answer) for answer in answers])
        return difficulty

    def _given(self, pool: Pool, ctx: Context, wanted: np.ndarray) -> np.ndarray:
        difficulty = np.full(len(pool), np.nan)
        for row in np.flatnonzero(wanted).tolist():
            id = int(pool.ids[row])
            value = pool.fields(id).get(self.field)
            if value is None:
                ctx.scorer.reasons[row] = f'no field "{self.field}"'
                continue
            try:
                difficulty[row] = float(value)
            except (TypeError, ValueError):
                difficulty[row] = np.nan
            if not np.isfinite(difficulty[row]):
                raise DataError(
                    f'row {id} has no number in its field "{self.field}": {value!r}',
                    pool.origin(id),
                    "Name another field with select.field=..., or use select.difficulty=judge.",
                )
        return difficulty


def question_of(record: Record) -> str:
    """The last thing that the user says."""
    said = [message.content for message in record.prompt if message.role == "user"]
    return said[-1] if said else ""


def trace_of(response: str) -> str:
    """The reasoning between <think> and </think>; the whole response without such marks."""
    found = TRACE.search(response)
    return found[1] if found else response


def without_repeats(trace: str) -> str:
    """The trace without lines that repeat an earlier one; blanks around a line do not count."""
    seen: set[bytes] = set()
    kept = []
    for line in trace.split("\n"):
        key = hashlib.blake2b(line.strip().encode(), digest_size=16).digest()
        if line.strip() and key not in seen:
            seen.add(key)
            kept.append(line.strip())
    return "\n".join(kept)


def rank_share(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 (lowest) to 1 (highest), equal values at the mean of their places, (rows,)."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - (count + 1) / 2
    return middle[group] / max(1, len(values) - 1)


def share_of_top(top: np.ndarray, top_ids: np.ndarray, ones: list[int]) -> np.ndarray:
    """Share of the ids ``ones`` in the probability of the two likeliest tokens, (texts,); both arrays (texts, 2)."""
    return (top * np.isin(top_ids, ones)).sum(1) / top.sum(1)
