"""Loss and perplexity on held-out rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ftrun.errors import ConfigError
from ftrun.evaluation.averages import ratio
from ftrun.evaluation.base import Evaluation, Evaluator, Metric, nothing_held_out
from ftrun.evaluation.likelihood import Likelihood, likelihood
from ftrun.registry import register

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@register("eval", "heldout")
@dataclass
class Heldout(Evaluator):
    """How well the model predicts the responses of held-out rows.

    ``loss`` is the mean negative log-likelihood of a response token over all rows, ``perplexity`` is ``exp(loss)`` and
    ``token_accuracy`` the share of response tokens that the model ranks first. Of a pair, the chosen answer counts.
    Tokens of one row are not independent, so the standard errors take rows as clusters (ratio estimator).
    """

    batch_tokens: int | None = (
        None  # upper bound of the tokens in one batch, padding included; null: 1024 on a CPU, 4096 on a GPU
    )

    asks_heldout: ClassVar[bool] = True

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        table = ctx.heldout_tokens
        if table is None or len(table) == 0:
            raise nothing_held_out("heldout", ctx)
        if table.sequences_per_row > 1:
            first = np.arange(len(table)) * table.sequences_per_row
            table = replace(table, sequences_per_row=1).rows(first)
        pieces = likelihood(bundle, table, ctx, self.batch_tokens, "held-out loss")
        first = np.flatnonzero(~table.continues)  # pieces of one text are one row
        found = Likelihood(*(np.add.reduceat(part, first) for part in (pieces.nll, pieces.tokens, pieces.correct)))
        rows = np.flatnonzero(found.tokens > 0)
        if len(rows) == 0:
            raise ConfigError(
                "eval=heldout has no response token to predict: the rows hold prompts or labels only",
                "eval.heldout",
                "Use eval=generation for prompts, or eval=classification for labels.",
            )
        nll, tokens, correct = found.nll[rows], found.tokens[rows], found.correct[rows]
        loss, loss_error = ratio(nll, tokens)
        accuracy, accuracy_error = ratio(correct, tokens)
        perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows at 709
        perplexity_error = None if loss_error is None else perplexity * loss_error  # first order: d exp(x) = exp(x) dx
        metrics = {
            "loss": Metric(loss, loss_error, len(rows), higher_is_better=False),
            "perplexity": Metric(perplexity, perplexity_error, len(rows), higher_is_better=False),
            "token_accuracy": Metric(accuracy, accuracy_error, len(rows)),
        }
        predictions = [
            {
                "id": int(table.record[first[row]]),
                "tokens": int(count),
                "loss": float(total / count),
                "correct": int(right),
            }
            for row, total, count, right in zip(rows, nll, tokens, correct, strict=True)
        ]
        return Evaluation(metrics, predictions)
