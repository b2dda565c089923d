"""Corrected texts against the clean ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftrun.evaluation.base import Evaluation, Metric
from ftrun.evaluation.generation import Generation, Prompt
from ftrun.registry import register
from ftrun.tokens.gec_proofread import SOURCE

if TYPE_CHECKING:
    from ftrun.context import Context
    from ftrun.models.bundle import Bundle


@register("eval", "proofread")
@dataclass
class Proofread(Generation):
    """Generates corrections of held-out texts and compares them with the clean ones (Liu et al., 2024, arXiv:2406.04523).

    ``accuracy`` is the share that is the clean text to the letter (EM), ``normalised_match`` the share that is so apart
    from case and punctuation (NEM), ``source_match`` the share of texts that were clean as they came, and
    ``spoiled_clean`` the share of those that the model changed.
    """

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        found = super().evaluate(bundle, ctx)
        rows = found.predictions
        spoiled = [1 - row["score"] for row in rows if row["was_clean"]]
        further = {
            "normalised_match": Metric.mean(row["normalised_match"] for row in rows),
            "source_match": Metric.mean(float(row["was_clean"]) for row in rows),
        }
        if spoiled:
            further["spoiled_clean"] = Metric.mean(spoiled, higher_is_better=False)
        return Evaluation(found.metrics | further, rows)

    def _judge(self, tokenizer: Any, prompt: Prompt, ids: list[int], stops: list[int]) -> dict[str, Any]:
        row = super()._judge(tokenizer, prompt, ids, stops)
        gold, output = prompt.record.response.strip(), row["output"]
        return row | {
            "gold": gold,
            "score": float(output == gold),
            "metric": "exact_match",
            "normalised_match": float(without_punctuation(output) == without_punctuation(gold)),
            "was_clean": prompt.record.fields.get(SOURCE) == gold,
        }


def without_punctuation(text: str) -> str:
    """Words in small letters, single blanks between them."""
    return " ".join(re.sub(r"[\W_]", " ", text.lower().replace("'", "").replace("’", "")).split())
