"""Selection by a classifier that learned which rows help a model as in-context examples."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from ftrun.config.values import parse_budget
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ComponentError, ConfigError, DataError
from ftrun.registry import register
from ftrun.select.base import PlannedTraining, Scorer
from ftrun.select.queries import load_queries
from ftrun.select.row_numbers import row_numbers
from ftrun.select.scoring.texts import added_ids, assistant_turns, encode
from ftrun.select.trials.incontext import Pace, blocks, engine_for, say_cost, timed
from ftrun.select.trials.inner import InnerTraining
from ftrun.training.scoring import segments

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.data.pool import Pool
    from ftrun.data.records import Record
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

SEPARATOR = "\n\n\n"  # between a demonstration and the prompt
NOISE = string.ascii_letters + string.digits + string.punctuation + " "
NOISE_BYTES = np.frombuffer(NOISE.encode(), np.uint8)
LINK = re.compile(r"https?://|www\.")
QUESTION = "\n\n### Helpful:"  # the classifier answers behind it
ANSWERS = (" yes", " no")
HELD_OUT = 0.1  # share of the labelled rows that the classifier is tested on
LORA = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["q", "v"]}


@register("select", "icon")
@dataclass
class Icon(Scorer):
    """In-context contribution (Yang et al., 2025, "ICon", later "RICo", arXiv:2505.05327).

    For a candidate T and rows S of an assessment set, given as ``select.queries``,

        s(T, S) = [ppl(S | random text as long as T) - ppl(S | T)] / ppl(S)
        contribution(T) = 2 / (1 + exp(-50 m)) - 1, m the mean of s over the assessment set; +-1 where |m| > 0.5

    (``icon_v1``: the mean of ppl(S) - ppl(S | T)). The best share of the candidates, as large as the share to select,
    is labelled helpful, all others not; LoRA adapters of the same model learn to tell them apart and score the pool.
    """

    version: Literal["rico", "icon_v1"] = "rico"  # formula of the contribution
    candidates: int = 5000  # rows whose contribution is measured, drawn by content among rows without links
    assessment: int = 1020  # rows of select.queries that they are measured on, drawn by content
    helpful: float | None = None  # share of the candidates labelled helpful; null: that of the budget
    max_length: int = 1024  # tokens of a row that the classifier reads; of a prompt and of an answer in the assessment
    demonstration_length: int = 2040  # tokens of a demonstration; a longer one is cut at its end
    classifier_epochs: int = 5  # passes over the labelled rows
    classifier_learning_rate: float = 5e-5  # peak, of the classifier
    classifier_batch_size: int = 128  # labelled rows per optimiser step

    column: ClassVar[str] = "icon"

    def __post_init__(self) -> None:
        for name in ("candidates", "assessment", "max_length", "demonstration_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"select.{name} must be at least 1", f"select.{name}={getattr(self, name)}")
        if self.helpful is not None and not 0 < self.helpful < 1:
            raise ConfigError("select.helpful is a share between 0 and 1", f"select.helpful={self.helpful}")

    def planned_tokens(self, lengths: np.ndarray) -> float:
        passes = min(self.candidates, len(lengths)) * self.assessment * (2 if self.version == "rico" else 1)
        return float(lengths.sum() + passes * 2 * lengths.mean())

    def planned_trainings(self, rows: int) -> list[PlannedTraining]:
        labelled = min(self.candidates, rows)
        return [PlannedTraining(labelled, self.classifier_epochs, self.classifier_batch_size)]

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Probability of being helpful, and the contribution of the candidates, (rows,) each; NaN without a response."""
        share = self._share(len(pool), ctx)
        rows = {place: _last_turn(record) for place, record in enumerate(pool) if list(assistant_turns(record))}
        for place in set(range(len(pool))) - set(rows):
            ctx.scorer.reasons[place] = "no response"
        columns = {name: np.full(len(pool), np.nan) for name in ("icon", "contribution")}
        numbers = row_numbers(pool, ctx.seed, "icon")
        free = np.array([place for place, (prompt, _) in rows.items() if not LINK.search(prompt)], np.int64)
        drawn = free[np.argsort(numbers[free], kind="stable")[: self.candidates]]  # in random order
        if not len(drawn):
            raise DataError("there is no row whose contribution could be measured: each has a link, or no response")
        ctx.report.note(f"the contribution of {len(drawn):,} of {len(pool):,} rows is measured (select.candidates)")
        contribution = self.contributions([rows[place] for place in drawn.tolist()], ctx)
        columns["contribution"][drawn] = contribution
        labels = label(contribution, share)
        if labels.all():
            raise ComponentError(
                f"all {len(drawn)} candidates contribute alike: there is nothing to learn from",
                todo="Raise select.candidates or select.assessment, or score with another model: select.model.path=...",
            )
        places = np.array(list(rows), np.int64)
        columns["icon"][places] = self._classified(list(rows.values()), np.searchsorted(places, drawn), labels, ctx)
        return columns

    def contributions(self, rows: ListLike[tuple[str, str]], ctx: Context) -> np.ndarray:
        """Contribution of each (prompt, response) to the assessment set, (rows,)."""
        tests = self._assessment(ctx)
        alone_texts = [(test.prompt, test.response) for test in tests]
        own = sum(len(prompt) + len(response) for prompt, response in alone_texts)
        engine = engine_for(ctx, "alone")
        with timed(engine, len(tests), own) as pace:
            alone = np.exp(engine.mean_nll(segments(alone_texts), "score the assessment set"))
        shown = [prompt + response for prompt, response in rows]
        helped = self._perplexities(shown, tests, lambda row, test: row, pace, ctx)
        if self.version == "icon_v1":
            return (alone - helped).mean(axis=1)
        baseline = self._perplexities(shown, tests, lambda row, test: random_text(row, test.text, ctx.seed), pace, ctx)
        return squashed(((baseline - helped) / (alone + 1e-6)).mean(axis=1))

    def _perplexities(
        self, rows: list[str], tests: list[Assessed], before: Callable[[str, Assessed], str], pace: Pace, ctx: Context
    ) -> np.ndarray:
        """ppl(S | demonstration), (rows, tests); ``before`` gives what stands in front of a test for a row.

        Demonstrations are made block by block: rows times tests of them would not fit into memory. What they take is
        told beforehand from that of the first test.
        """
        tokenizer = ctx.scorer.tokenizer
        lead, separator = added_ids(tokenizer)[0], encode(tokenizer, [SEPARATOR])[0]
        own = sum(len(test.prompt) + len(test.response) + len(separator) for test in tests)
        first = [len(ids) for ids in encode(tokenizer, [before(row, tests[0]) for row in rows])]
        if longer := sum(length > self.demonstration_length for length in first):
            ctx.report.note(f"{longer:,} of {len(rows):,} demonstrations are cut at {self.demonstration_length} tokens")
        sizes = [own + len(tests) * min(length, self.demonstration_length) for length in first]
        what = f"{len(rows):,} candidates x {len(tests):,} rows"
        passes, todo = len(rows) * len(tests), "select.candidates and select.assessment make them fewer"
        say_cost(ctx, what, passes, sum(sizes), pace, todo)
        found = []
        for start, end in blocks(sizes):
            pairs = [(before(row, test), test) for row in rows[start:end] for test in tests]
            shown = list(dict.fromkeys(text for text, _ in pairs))
            ids = {
                text: whole[: self.demonstration_length]
                for text, whole in zip(shown, encode(tokenizer, shown), strict=True)
            }
            texts = [
                ([*lead, *ids[text], *separator, *test.prompt[len(lead) :]], test.response) for text, test in pairs
            ]
            title = f"candidates {start + 1:,} to {end:,} of {len(rows):,}"
            nll = engine_for(ctx, shown).mean_nll(segments(texts), title)
            found.append(np.exp(nll).reshape(end - start, len(tests)))
        return np.concatenate(found)

    def _assessment(self, ctx: Context) -> list[Assessed]:
        """The rows that contributions are measured on. Raises DataError where none can be used."""
        tokenizer, found, left_out = ctx.scorer.tokenizer, [], 0
        lead = added_ids(tokenizer)[0]
        for pool in load_queries(ctx.settings).pools:
            numbers = row_numbers(pool, ctx.seed, "icon assessment")
            for number, record in zip(numbers.tolist(), pool, strict=True):
                prompt, response = _last_turn(record) if list(assistant_turns(record)) else ("", "")
                ids = encode(tokenizer, [prompt, response])
                if ids[1] and max(map(len, ids)) <= self.max_length:
                    found.append((number, Assessed(prompt + response, [*lead, *ids[0]], ids[1])))
                else:
                    left_out += 1
        if not found:
            raise DataError(
                f"no row of the assessment set has a prompt and a response of at most {self.max_length} tokens",
                "select.queries",
            )
        if left_out:
            ctx.report.note(
                f"{left_out:,} rows of select.queries do not assess: no response, or over {self.max_length:,} tokens"
            )
        found.sort(key=lambda pair: pair[0])
        ctx.report.note(f"{min(len(found), self.assessment):,} rows of select.queries assess (select.assessment)")
        return [test for _, test in found[: self.assessment]]

    def _share(self, rows: int, ctx: Context) -> float:
        """Share of the candidates that is labelled helpful."""
        unit, amount = parse_budget(ctx.settings.budget) or ("", 0.0)
        share = self.helpful or {"share": amount, "rows": amount / rows}.get(unit)
        if share is None or not 0 < share < 1:
            raise ConfigError(
                f"budget={ctx.settings.budget} does not say what share of the candidates is helpful",
                todo="Set select.helpful=0.15, or a budget that is a share of the rows.",
            )
        return share

    def _classified(
        self, rows: list[tuple[str, str]], labelled: np.ndarray, labels: np.ndarray, ctx: Context
    ) -> np.ndarray:
        """Probability that each row is helpful, by a classifier trained on the labelled ones, (rows,)."""
        tokenizer = ctx.scorer.tokenizer
        lead, question = added_ids(tokenizer)[0], encode(tokenizer, [QUESTION])[0]
        answers = first_difference(*encode(tokenizer, list(ANSWERS)))
        room = min(self.max_length, ctx.scorer.bundle.context_length - 1) - len(lead) - len(question)
        bodies = encode(tokenizer, [prompt + response for prompt, response in rows])
        if cut := sum(len(body) > room for body in bodies):
            ctx.report.note(f"the classifier reads {cut:,} of {len(rows):,} rows up to {self.max_length} tokens only")
        texts = [[*lead, *body[:room], *question] for body in bodies]
        tested = int(len(labelled) * HELD_OUT)
        learned = labelled[: len(labelled) - tested]
        wanted = [answers[0] if helpful else answers[1] for helpful in labels]
        table = TokenTable.from_sequences(
            [_answered(texts[place], answer, place) for place, answer in zip(learned.tolist(), wanted, strict=False)]
        )
        training = InnerTraining(
            epochs=self.classifier_epochs,
            learning_rate=self.classifier_learning_rate,
            batch_size=self.classifier_batch_size,
            lora=LORA,
            called="select.classifier_",
        )
        asked = TokenTable.from_sequences([_answered(text, answers[0], place) for place, text in enumerate(texts)])

        def helpful(bundle: Bundle, batch: Batch) -> list[np.ndarray]:
            states = bundle.architecture.hidden_states(bundle.model, batch)[batch.predicting]
            logits = bundle.architecture.head(bundle.model).logits(states)[:, answers].float()
            return list(torch.softmax(logits, -1)[:, :1].cpu().numpy())

        with training.trained(table, ctx, "train the classifier") as epoch:
            found = epoch.scoring(ctx).measure(asked, "helpful", helpful, "classify the pool", packable=True)
        probability = np.concatenate(found).astype(np.float64)
        self._tell(probability[labelled[len(learned) :]], labels[len(learned) :], ctx)
        return probability

    def _tell(self, probability: np.ndarray, labels: np.ndarray, ctx: Context) -> None:
        if labels.any() and not labels.all():
            right = probability[labels][:, None] - probability[~labels][None, :]
            share = float(((right > 0) + 0.5 * (right == 0)).mean())
            ctx.report.note(f"on {len(labels)} candidates that it did not learn, it ranks {share:.0%} of pairs rightly")


@dataclass
class Assessed:
    """A row of the assessment set: its text, and its tokens."""

    text: str
    prompt: list[int]
    response: list[int]


def first_difference(one: list[int], other: list[int]) -> list[int]:
    """The tokens in which two texts first differ; some tokenizers write a blank of its own in front of both."""
    return next([a, b] for a, b in zip(one, other, strict=False) if a != b)


def label(contribution: np.ndarray, share: float) -> np.ndarray:
    """Whether each candidate is in the best ``share``, (candidates,) bool; ties at the edge are."""
    return contribution >= np.quantile(contribution, 1 - share)


def squashed(mean: np.ndarray) -> np.ndarray:
    """Between -1 and 1, and these beyond 0.5 on either side."""
    inside = 2 / (1 + np.exp(-50 * np.clip(mean, -0.5, 0.5))) - 1
    return np.where(np.abs(mean) > 0.5, np.sign(mean), inside)


def random_text(demonstration: str, test: str, seed: int) -> str:
    """As many random characters as the demonstration has, the same for the same pair of texts."""
    digest = hashlib.blake2b(f"{seed}/{demonstration}/{test}".encode(), digest_size=8).digest()
    draw = np.random.default_rng(int.from_bytes(digest))
    return NOISE_BYTES[draw.integers(0, len(NOISE), len(demonstration))].tobytes().decode()


def _last_turn(record: Record) -> tuple[str, str]:
    """The prompt in the layout that the method uses, and the last answer."""
    before, response = list(assistant_turns(record))[-1]
    heads = {"assistant": "### Response:\n", "user": "### Instruction:\n"}
    parts = [heads.get(message.role, "") + message.content + "\n\n" for message in before]
    return "".join(parts) + "### Response:\n", response


def _answered(text: list[int], answer: int, number: int) -> Sequence:
    """The text and the answer, which alone is learned or asked for."""
    weight = np.zeros(len(text) + 1, np.float32)
    weight[-1] = 1
    return Sequence(np.array([*text, answer], np.int32), weight, number)
