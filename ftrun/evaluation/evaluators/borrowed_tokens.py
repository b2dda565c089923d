"""Whether the words that tuning put into a model's answers are those of similar training rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ftrun.config.settings import ModelConfig
from ftrun.data.pool import load_pool
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.averages import ratio
from ftrun.evaluation.base import Evaluation, Evaluator, Metric
from ftrun.evaluation.shifts import Answer, Comparison
from ftrun.models.load import load_bundle
from ftrun.registry import register
from ftrun.runs.artifacts import cache_dir
from ftrun.select.geometry.embed import MINILM_LENGTH, embed_texts
from ftrun.select.geometry.nearest import best_places, products
from ftrun.training.scoring import Scoring

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@register("eval", "borrowed_tokens")
@dataclass
class BorrowedTokens(Evaluator):
    """Shifted tokens that stand in similar training responses (Ghosh et al., 2024, arXiv:2402.05119).

    Each answer of the tuned model is compared with its base as in ``eval=token_shift``. ``borrowed`` is the share of
    its shifted tokens that occur in the ``k`` training responses nearest to the answer, by cosine of sentence
    embeddings; ``borrowed_unshifted`` is that share of all other tokens, as a yardstick: common words occur anywhere.
    """

    k: int = 5  # most similar training responses that are searched
    index: str | None = None  # file of rows whose responses are searched; null: the rows that this run trains on
    base: str | None = None  # untuned model: folder, hub id or run folder; null: the model that the run started from
    context: Literal["plain", "same"] = (
        "plain"  # what the base reads before the answer: the bare query, or the template
    )
    rows: int = 16  # held-out rows to answer, the first ones
    max_new_tokens: int = 128  # longest answer, in tokens
    batch_size: int = 8  # rows generated at a time

    asks_heldout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("k", "rows", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                where = f"eval.borrowed_tokens.{name}={getattr(self, name)}"
                raise ConfigError(f"eval.borrowed_tokens.{name} must be at least 1", where)

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        responses = self._responses(bundle, ctx)
        shift = Comparison(self.base, self.context, self.rows, self.max_new_tokens, self.batch_size)
        answers = shift.answers(bundle, ctx, "borrowed_tokens")
        near = self._nearest(answers, responses, bundle, ctx)
        held = [
            borrowed(answer.tokens, [responses[row] for row in rows])
            for answer, rows in zip(answers, near, strict=True)
        ]
        metrics = {
            "borrowed": _share([part[a.shifted] for part, a in zip(held, answers, strict=True)]),
            "borrowed_unshifted": _share([part[~a.shifted] for part, a in zip(held, answers, strict=True)]),
        }
        tokenizer = bundle.tokenizer
        predictions = [
            {
                "id": answer.id,
                "output": tokenizer.decode(answer.tokens),
                "shifted": int(answer.shifted.sum()),
                "borrowed": [tokenizer.decode([token]) for token in answer.tokens[answer.shifted & found]],
                "nearest": [tokenizer.decode(responses[row]) for row in rows],
            }
            for answer, found, rows in zip(answers, held, near, strict=True)
        ]
        return Evaluation(metrics, predictions)

    def _responses(self, bundle: Bundle, ctx: Context) -> list[np.ndarray]:
        """Token ids of every training response that is not empty. Raises ConfigError where no rows are known."""
        if self.index is not None:
            data = replace(ctx.settings.data, path=self.index, weights=None, limit=None)
            pool = load_pool(data, cache_dir() / "data", ctx.seed)
            if pool.kind != "sft":
                raise DataError(
                    f"the rows to search have no responses: they are {pool.kind} rows",
                    f"eval.borrowed_tokens.index={self.index}",
                    "Name a file of prompts with responses.",
                )
            texts = [record.response for record in pool]
            encoded = bundle.tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False).input_ids
            found = [np.array(ids, np.int64) for ids in encoded]
        elif ctx.train_tokens is not None:
            sequences = [ctx.train_tokens.sequence(number) for number in range(len(ctx.train_tokens.record))]
            found = [np.asarray(item.input_ids)[np.asarray(item.loss_weight) > 0] for item in sequences]
        else:
            raise ConfigError(
                "eval=borrowed_tokens does not know which rows the model was trained on",
                "eval.borrowed_tokens.index=null",
                "Name them with eval.borrowed_tokens.index=FILE: the run's data.path, or its selection/selected.jsonl.",
            )
        return [ids for ids in found if len(ids)]

    def _nearest(
        self, answers: list[Answer], responses: list[np.ndarray], bundle: Bundle, ctx: Context
    ) -> list[np.ndarray]:
        """Places of the ``k`` responses nearest to each answer; none for an empty answer."""
        if not responses:
            return [np.zeros(0, np.int64) for _ in answers]
        encoder = Scoring(lambda: _encoder(ctx), ctx.team, ctx.report)
        texts = [bundle.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
        asked = [bundle.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers]
        vectors = embed_texts([*asked, *texts], encoder, MINILM_LENGTH)
        matrix = products(vectors[: len(asked)], vectors[len(asked) :])
        return [
            best_places(row, self.k) if len(answer.tokens) else np.zeros(0, np.int64)
            for row, answer in zip(matrix, answers, strict=True)
        ]


def borrowed(tokens: np.ndarray, responses: list[np.ndarray]) -> np.ndarray:
    """Whether each token occurs in any of the responses, (tokens,) bool."""
    known: Any = np.concatenate(responses) if responses else np.zeros(0, np.int64)
    return np.isin(tokens, known)


def _share(values: list[np.ndarray]) -> Metric:
    """Share of all tokens, with answers as clusters; no number where there are none."""
    filled = [part for part in values if len(part)]
    if not filled:
        return Metric(math.nan, None, 0, higher_is_better=False)
    counts = np.array([len(part) for part in filled])
    value, error = ratio(np.array([float(part.sum()) for part in filled]), counts)
    return Metric(value, error, int(counts.sum()), higher_is_better=False)


def _encoder(ctx: Context) -> Bundle:
    return load_bundle(ModelConfig(path="builtin:minilm"), task="classify", device=ctx.team.device)
