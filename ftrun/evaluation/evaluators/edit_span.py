"""Edits that the model writes, applied and compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftrun.data import edits
from ftrun.data.answers import normalised, word_f1
from ftrun.errors import ConfigError
from ftrun.evaluation.answering import Answering, Prompt
from ftrun.evaluation.base import Evaluation, Metric
from ftrun.registry import register
from ftrun.tokens.edited import EDIT_SOURCE, EDIT_TARGET

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@register("eval", "edit_span")
@dataclass
class EditSpans(Answering):
    """Generates edits for held-out rows of tokens=edit_span, applies them to the source and compares with the target.

    ``accuracy`` is the share of edited texts that are the target (apart from case, spaces and final punctuation),
    ``word_f1`` their mean F1 of words, and ``source_word_f1`` that of the unedited sources, to compare with. Lines that
    are no edit, and edits out of range or over others, are left out: ``refused`` is the share of answers with such a
    line. Without any edit the source counts. ``length`` is the length of the answers as a share of the targets', in
    tokens.
    """

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        found = super().evaluate(bundle, ctx)
        rows = found.predictions
        further = {
            "word_f1": Metric.mean(row["word_f1"] for row in rows),
            "source_word_f1": Metric.mean(row["source_word_f1"] for row in rows),
            "refused": Metric.mean((float(row["refused"] > 0) for row in rows), higher_is_better=False),
            "length": Metric.mean((row["length"] for row in rows), higher_is_better=False),
        }
        return Evaluation(found.metrics | further, rows)

    def _judge(self, tokenizer: Any, prompt: Prompt, ids: list[int], stops: list[int]) -> dict[str, Any]:
        fields = prompt.record.fields
        if not (isinstance(fields.get(EDIT_SOURCE), str) and isinstance(fields.get(EDIT_TARGET), str)):
            raise ConfigError(
                "eval=edit_span applies edits, and the held-out rows hold none",
                "eval=edit_span",
                "Add tokens=edit_span.",
            )
        source, target = fields[EDIT_SOURCE], fields[EDIT_TARGET]
        row = super()._judge(tokenizer, prompt, ids, stops)
        wanted, unread = edits.read(row["output"])
        text, refused = edits.apply(wanted, source)
        return row | {
            "edits": row["output"],
            "output": text,
            "gold": target,
            "score": float(normalised(text) == normalised(target)),
            "metric": "exact_match",
            "word_f1": word_f1(text, target),
            "source_word_f1": word_f1(source, target),
            "refused": unread + refused,
            "length": len(ids) / max(1, len(tokenizer(target, add_special_tokens=False)["input_ids"])),
        }
