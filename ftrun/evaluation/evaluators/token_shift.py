"""Which tokens of a tuned model's answers its base model would not have written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.averages import ratio
from ftrun.evaluation.base import Evaluation, Evaluator, Metric
from ftrun.evaluation.shifts import Answer, Comparison
from ftrun.registry import register
from ftrun.runs.artifacts import write_json

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

PARTS = ((0, 5), (5, 20), (20, 100), (100, None))  # positions of an answer that are counted together
MOST_FREQUENT = 30  # shifted tokens that are listed


@register("eval", "token_shift")
@dataclass
class TokenShift(Evaluator):
    """How far tuning has moved the choice of tokens (Lin et al., 2024, arXiv:2312.01552).

    The tuned model answers held-out prompts greedily, in its own template. The base model reads the same answer, and
    each token has a rank in what the base would say there: 1 is ``unshifted``, 2 or 3 ``marginal``, more ``shifted``;
    the three are shares of all tokens and add up to 1. ``kl`` is the mean of KL(tuned || base) and ``base_probability``
    that of the token's probability under the base. Shares by position and the most frequent shifted tokens are in
    eval/token_shift.json. The token that ends the answer is left out: a plain text has none.
    """

    base: str | None = None  # untuned model: folder, hub id or run folder; null: the model that the run started from
    context: Literal["plain", "same"] = (
        "plain"  # what the base reads before the answer: the bare query, or the template
    )
    rows: int = 16  # held-out rows to answer, the first ones
    max_new_tokens: int = 128  # longest answer, in tokens
    batch_size: int = 8  # rows generated at a time

    asks_heldout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("rows", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                where = f"eval.token_shift.{name}={getattr(self, name)}"
                raise ConfigError(f"eval.token_shift.{name} must be at least 1", where)

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        comparison = Comparison(self.base, self.context, self.rows, self.max_new_tokens, self.batch_size)
        answers = comparison.answers(bundle, ctx, "token_shift")
        tokens = np.array([len(answer.tokens) for answer in answers])
        if not tokens.sum():
            raise DataError("eval=token_shift has nothing to compare: every answer is empty")
        metrics = {
            "unshifted": _share([answer.rank == 1 for answer in answers]),
            "marginal": _share([(answer.rank > 1) & ~answer.shifted for answer in answers], higher_is_better=False),
            "shifted": _share([answer.shifted for answer in answers], higher_is_better=False),
            "kl": _share([answer.kl for answer in answers], higher_is_better=False),
            "base_probability": _share([answer.probability for answer in answers]),
        }
        if ctx.team.rank == 0:
            write_json(ctx.evaluation / "token_shift.json", details(answers, bundle.tokenizer))
        return Evaluation(metrics, [_prediction(answer, bundle.tokenizer) for answer in answers])


def details(answers: Sequence[Answer], tokenizer: Any) -> dict[str, Any]:
    """Shares by position in the answer, and the tokens that are shifted most often."""
    positions = []
    for start, end in PARTS:
        ranks = np.concatenate([answer.rank[start:end] for answer in answers])
        if len(ranks):
            shares = {"unshifted": ranks == 1, "marginal": (ranks > 1) & (ranks <= 3), "shifted": ranks > 3}
            named = {name: float(chosen.mean()) for name, chosen in shares.items()}
            positions.append({"from": start + 1, "to": end, "tokens": len(ranks), **named})
    counts = Counter(int(token) for answer in answers for token in answer.tokens[answer.shifted])
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_FREQUENT]
    shifted = [{"id": token, "token": tokenizer.decode([token]), "count": count} for token, count in ordered]
    return {"by_position": positions, "most_shifted": shifted}


def _share(values: list[np.ndarray], higher_is_better: bool = True) -> Metric:
    """Mean over all tokens, with answers as clusters."""
    counts = np.array([len(part) for part in values])
    filled = counts > 0
    totals = np.array([float(part.sum()) for part in values])
    value, error = ratio(totals[filled], counts[filled])
    return Metric(value, error, int(counts.sum()), higher_is_better)


def _prediction(answer: Answer, tokenizer: Any) -> dict[str, Any]:
    shifted = [tokenizer.decode([token]) for token in answer.tokens[answer.shifted]]
    return {
        "id": answer.id,
        "prompt": answer.prompt,
        "output": tokenizer.decode(answer.tokens),
        "tokens": len(answer.tokens),
        "shifted": shifted,
        "rank": answer.rank.astype(int).tolist(),
        "base_probability": [round(float(p), 6) for p in answer.probability],
        "kl": [round(float(kl), 6) for kl in answer.kl],
    }
