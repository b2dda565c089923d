"""Corrected texts against the clean ones."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.answering import Answering, Prompt
from ftrun.evaluation.base import Evaluation, Metric
from ftrun.models.load import load_bundle
from ftrun.registry import register
from ftrun.select.scoring.next_token import chat_prompt, next_token
from ftrun.tokens.edited import SOURCE
from ftrun.training.scoring import Scoring

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

NO_ERROR = "Is this text free of errors in spelling, grammar and punctuation? Answer yes or no."
SAME_MEANING = "Do these two texts mean the same? Answer yes or no."


@register("eval", "proofread")
@dataclass
class Proofread(Answering):
    """Generates corrections of held-out texts and compares them with the clean ones (Liu et al., 2024, arXiv:2406.04523).

    ``accuracy`` is the share that is the clean text to the letter (EM), ``normalised_match`` the share that is so apart
    from case and punctuation (NEM), ``source_match`` the share of texts that were clean as they came, and
    ``spoiled_clean`` the share of those that the model changed. A judge, which is asked two questions and counts as
    saying yes where that is likelier than no, adds ``error``, the share of answers that have an error left,
    ``other_meaning``, of those that mean something else than the clean text, ``good``, of those that have neither
    fault, and ``bad = 1 - good``.
    """

    judge: str | None = None  # language model that judges the answers: a folder or hub id; null: no judge

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
        if self.judge is not None and rows:
            further |= self._judged(self.judge, rows, ctx)
        return Evaluation(found.metrics | further, rows)

    def _judged(self, judge: str, rows: list[dict[str, Any]], ctx: Context) -> dict[str, Metric]:
        """The judge's shares; what it says of a row stands in the row. All processes have all rows."""
        config = replace(ctx.settings.model, path=judge, revision=None)
        bundle = load_bundle(config, task="causal", device=ctx.team.device)
        asked = [chat_prompt(bundle.tokenizer, NO_ERROR, row["output"]) for row in rows]
        pairs = [f"First text:\n{row['output']}\n\nSecond text:\n{row['gold']}" for row in rows]
        asked += [chat_prompt(bundle.tokenizer, SAME_MEANING, pair) for pair in pairs]
        longest = max(map(len, asked))
        if longest > bundle.context_length:
            raise DataError(
                f"a question to the judge has {longest} tokens, and it attends to {bundle.context_length}",
                f"eval.proofread.judge={judge}",
                "Name a judge with a longer context, or lower eval.proofread.max_new_tokens or data.max_length.",
            )
        answers = [_ids_of(word, bundle, judge) for word in ("yes", "no")]
        engine = replace(ctx, scoring=Scoring(lambda: bundle, ctx.team, ctx.report))
        yes, no = next_token(asked, answers, engine, "judge corrections").asked.T
        no_error, same_meaning = np.split(yes > no, 2)
        for row, clean, same in zip(rows, no_error.tolist(), same_meaning.tolist(), strict=True):
            row |= {"no_error": clean, "same_meaning": same and bool(row["output"])}
        good = [float(row["no_error"] and row["same_meaning"]) for row in rows]
        return {
            "error": Metric.mean((float(not row["no_error"]) for row in rows), higher_is_better=False),
            "other_meaning": Metric.mean((float(not row["same_meaning"]) for row in rows), higher_is_better=False),
            "good": Metric.mean(good),
            "bad": Metric.mean((1 - share for share in good), higher_is_better=False),
        }

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


def _ids_of(word: str, bundle: Bundle, judge: str) -> list[int]:
    """Tokens that are this word, small or with a capital, with and without a blank. Raises ConfigError without one."""
    forms = [blank + form for blank in ("", " ") for form in (word, word.capitalize())]
    found = {tuple(ids) for ids in bundle.tokenizer(forms, add_special_tokens=False).input_ids if len(ids) == 1}
    if not found:
        raise ConfigError(
            f'the judge has no token for "{word}"', f"eval.proofread.judge={judge}", "Name another model."
        )
    return sorted(number for (number,) in found)


def without_punctuation(text: str) -> str:
    """Words in small letters, single blanks between them."""
    return " ".join(re.sub(r"[\W_]", " ", text.lower().replace("'", "").replace("’", "")).split())
