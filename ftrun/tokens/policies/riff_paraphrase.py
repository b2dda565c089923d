"""Paraphrases of labelled texts by a paraphraser that was trained to help the classifier."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftrun.data.batches import token_budget
from ftrun.data.records import Message, Record
from ftrun.data.render import Renderer, apply_template
from ftrun.data.tokens import TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.models.load import load_bundle
from ftrun.registry import register
from ftrun.runs import stagecache
from ftrun.runs.artifacts import digest
from ftrun.runs.stagecache import key_of
from ftrun.select.run import written_beside
from ftrun.tokens.base import TokenPolicy, edited_row
from ftrun.tokens.demonstrations import filled, text_of
from ftrun.tokens.edited import edited_rows, with_prompt
from ftrun.tokens.paraphraser import Drafts, Example, ParaphraserTraining, check_room, paraphrases
from ftrun.tokens.reference import own_scoring
from ftrun.training.scoring import Scoring, segments

if TYPE_CHECKING:
    from pathlib import Path

    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

WEIGHT = "row_weight"  # column of an edited row
FOUND = "paraphrases.json"
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32.0, "target_modules": "all-linear"}


@register("tokens", "riff_paraphrase")
@dataclass
class RiffParaphrase(TokenPolicy):
    """Trains a paraphraser for the classifier, then the classifier on paraphrases (Najafi & Fyshe, 2024, arXiv:2403.02271).

    Stage 1, the model frozen: of each text x with label y the paraphraser draws m paraphrases z, half sampled, half by
    diverse beams; ``r = log P_lm(y|z) - log P_lm(y|x)``, rz = r with mean 0 and deviation 1 over the m. Its loss is
    ``mean_x -log sum_z P(z|x) exp(rz) + kl * mean sg[log P - log P_init + 1] log P``, trained as a LoRA adapter.
    Stage 2: the run trains ``0.5 log P(y|x) + 0.5 mean_z log P(y|z)`` by the weights of the rows, with any adapter.
    Rows are labelled texts, or conversations that end with a label: then the last user turn is paraphrased.
    """

    paraphraser: str | None = None  # causal model that paraphrases: a folder or hub id; null: the run's own model
    m: int = 8  # paraphrases of each text; 0: the rows alone
    steps: int = 50  # optimiser steps that the paraphraser learns for; 0: it stays as it is
    batch_size: int = 8  # texts per such step, over all processes
    learning_rate: float = 1e-4  # peak of that training
    kl: float = 0.1  # weight of what keeps the paraphraser near its start
    top_p: float = 0.99  # probability mass of the tokens that are sampled from
    diversity: float = 1.0  # nats that a beam pays for a token that an earlier beam has taken
    max_new_tokens: int = 64  # longest paraphrase, in tokens
    instruction: str = "Paraphrase this text. Answer with the paraphrase only."  # stands above the text
    template: str = "{text}\nLabel: {label}"  # prompt and answer of a labelled text
    words: dict[str, str] = field(default_factory=dict)  # label -> word that stands for it; others stand for themselves

    needs: ClassVar[dict[str, str]] = {"token_loss": "weighs the rows by their tokens"}
    edits: ClassVar[bool] = True
    eats: ClassVar[tuple[str, ...]] = ("labels", "sft")
    edits_heldout: ClassVar[bool] = True
    edit_uses_model: ClassVar[bool] = True
    static: ClassVar[bool] = True

    def __post_init__(self) -> None:
        least = {"m": 0, "steps": 0, "batch_size": 1, "max_new_tokens": 1, "kl": 0, "diversity": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ConfigError(f"tokens.{name} must be at least {bound}", f"tokens.{name}={getattr(self, name)}")
        if self.m == 1:
            raise ConfigError("one paraphrase has no other to be compared with", "tokens.m=1", "Use tokens.m=2.")
        if not 0 < self.top_p <= 1:
            raise ConfigError("tokens.top_p is a share above 0 and up to 1", f"tokens.top_p={self.top_p:g}")
        if not self.learning_rate > 0:
            raise ConfigError("tokens.learning_rate must be above 0", f"tokens.learning_rate={self.learning_rate:g}")
        if not 0 <= self.template.find("{text}") < self.template.find("{label}"):
            raise ConfigError("tokens.template holds {text} and then {label}", f"tokens.template={self.template!r}")

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        """Each row, and then its paraphrases; held-out rows as prompts only. Raises DataError for other kinds of rows."""
        heldout = records is ctx.heldout
        rows = list(records)
        for record in rows:
            self._check(record)
        found: list[list[str]] = [[] for _ in rows]
        if self.m and rows and not heldout:
            found = self._paraphrased(rows, ctx)
        yield from self.weighted(rows, found)
        if self.m and not heldout:
            self._say(rows, found, ctx)

    def weighted(self, rows: list[Record], found: list[list[str]]) -> Iterator[dict[str, Any]]:
        """Rows with weights of mean 1 over all: half for the original, half for its paraphrases together."""
        kept = [[text for text in texts if text] for texts in found]
        scale = (len(rows) + sum(map(len, kept))) / max(1, len(rows))
        for record, texts in zip(rows, kept, strict=True):
            yield self._row(record, 0, scale * (0.5 if texts else 1.0))
            for number, text in enumerate(texts, 1):
                yield self._row(with_prompt(record, text), number, scale * 0.5 / len(texts))

    def precompute(self, table: TokenTable, ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        """The weight of its row as score of every trained token, and the loss weights times it."""
        weight_of = np.array([row[WEIGHT] for row in edited_rows(ctx)])
        factor = np.repeat(weight_of[np.asarray(table.record)], table.lengths)
        weights = np.asarray(table.loss_weight)
        return np.where(weights > 0, factor, np.nan), (weights * factor).astype(np.float32)

    # ---- stage 1 ----

    def _paraphrased(self, rows: list[Record], ctx: Context) -> list[list[str]]:
        """Paraphrases of every row by the trained paraphraser; kept for the next run that asks for the same."""
        own = own_scoring(ctx)
        classifier = own.bundle
        paraphraser = classifier if self.paraphraser is None else _load(self.paraphraser, ctx)
        examples = self._examples(rows, paraphraser, classifier)
        check_room(examples, paraphraser, classifier, self._drafts)
        answers = paraphraser.tokenizer([self._word(record) for record in rows], add_special_tokens=False).input_ids
        table = segments((e.request, ids) for e, ids in zip(examples, answers, strict=True))
        read = TokenTable.from_sequences([example.classified(example.text) for example in examples])
        classifies = digest([classifier.computes, read.fingerprint()])
        training = self._training(len(rows), classifies).rewarded(examples, classifier)
        quant = ctx.settings.slots["quant"]
        what = {
            "training": asdict(training),
            "table": table.fingerprint(),
            "model": paraphraser.computes | {"quant": quant},
            "steps": self.steps,
            "seed": ctx.seed,
        }
        chosen = {"quant": [quant[0]], "select": [], "picker": [], "tokens": []}
        key = key_of("paraphrases", what, modules=[__name__, type(training).__module__], chosen=chosen)
        assert own.shards is not None
        file = own.shards / f"paraphrases-{key.digest}" / FOUND
        there = stagecache.fetch(key, file.parent) if ctx.team.rank == 0 else None
        if ctx.team.gather_object(there)[0]:
            ctx.report.note("the same paraphrases were made before: they are used again")
            found = json.loads(file.read_text())
        else:
            found = self._made(examples, table, training, paraphraser, ctx)
            if ctx.team.rank == 0:
                with written_beside(file) as beside:
                    beside.write_text(json.dumps(found, ensure_ascii=False))
                stagecache.keep(key, [file])
        own.discard()
        return found

    def _made(
        self,
        examples: list[Example],
        table: TokenTable,
        training: ParaphraserTraining,
        paraphraser: Bundle,
        ctx: Context,
    ) -> list[list[str]]:
        own = own_scoring(ctx)
        # every text is written and read m times at once
        small = max(1, token_budget(ctx.settings.train.batch_tokens, paraphraser.device) // self.m)
        settings = replace(ctx.settings, train=replace(ctx.settings.train, batch_tokens=small))
        engine = Scoring(lambda: paraphraser, ctx.team, ctx.report, small, own.shards)
        ctx = replace(ctx, settings=settings, scoring=engine)
        ctx.report.note(
            f"the paraphraser writes {self.m} paraphrases of {min(self.batch_size, len(examples))} texts in each of "
            f"{self.steps} steps, and then {self.m * len(examples)} to train on"
        )
        if not self.steps:
            return paraphrases(examples, engine, self._drafts, ctx.seed)
        with training.trained(table, ctx, "train the paraphraser") as epoch:
            if ctx.team.rank == 0:
                _say_rewards(epoch.trainer.folder / "metrics.jsonl", ctx)
            return paraphrases(examples, epoch.scoring(ctx), self._drafts, ctx.seed)

    def _training(self, rows: int, classifies: str) -> ParaphraserTraining:
        return ParaphraserTraining(
            epochs=max(1, -(-self.steps * min(self.batch_size, rows) // rows)),
            max_steps=self.steps or 1,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            schedule="constant",
            lora=LORA,
            drafts=self._drafts,
            kl=self.kl,
            classifies=classifies,
        )

    @property
    def _drafts(self) -> Drafts:
        return Drafts(self.m, self.top_p, self.diversity, self.max_new_tokens)

    def _examples(self, rows: list[Record], paraphraser: Bundle, classifier: Bundle) -> list[Example]:
        asks, reads = Renderer(paraphraser.tokenizer), Renderer(classifier.tokenizer, train_on="last_response")

        def example(record: Record) -> Example:
            text, where = _text(record), f"row {record.id}"
            request = Record(record.id, "prompts", (Message("user", f"{self.instruction}\n\n{text}"),))

            def classified(text: str) -> Any:
                turns = self._turns(with_prompt(record, text))
                return reads.sequences(Record(record.id, "sft", turns), where)[0]

            return Example(text, asks.prompt_ids(request, where), classified, where)

        return [example(record) for record in rows]

    # ---- rows ----

    def _row(self, record: Record, number: int, weight: float) -> dict[str, Any]:
        return edited_row(record, self._turns(record)) | {"paraphrase": number, WEIGHT: weight}

    def _turns(self, record: Record) -> tuple[Message, ...]:
        if record.kind == "sft":
            return record.messages
        prompt = filled(self.template, text_of(record), None)
        return (Message("user", prompt), Message("assistant", self._word(record)))

    def _word(self, record: Record) -> str:
        if record.kind == "sft":
            return record.response
        return self.words.get(str(record.label), str(record.label))

    def _check(self, record: Record) -> None:
        if record.kind == "labels" or any(message.role == "user" for message in record.prompt):
            return
        raise DataError(
            f"row {record.id} has no user turn to paraphrase",
            f"tokens={self.name}",  # type: ignore[attr-defined]
            "Give rows with text and label, or conversations that end with a label.",
        )

    def _say(self, rows: list[Record], found: list[list[str]], ctx: Context) -> None:
        texts = [(record, text) for record, group in zip(rows, found, strict=True) for text in group]
        new = {(record.id, text) for record, text in texts if text and text != _text(record)}
        empty = sum(not text for _, text in texts)
        answers = {self._word(record) for record in rows}
        ctx.report.note(
            f"{len(texts)} paraphrases of {len(rows)} texts: {len(new)} different ones, {empty} empty and left out"
        )
        if len(answers) == len(rows) > 2:
            ctx.report.warn("every row has an answer of its own: this method is for labels that many rows share")


def _say_rewards(file: Path, ctx: Context) -> None:
    """Tell how the mean reward went, and keep it."""
    rewards = [json.loads(line)["reward"] for line in file.read_text().splitlines()]
    ctx.facts["paraphraser"] = {"reward_first_step": rewards[0], "reward_last_step": rewards[-1]}
    ctx.report.note(
        f"reward of a paraphrase: {rewards[0]:.3f} in the first step, {rewards[-1]:.3f} in the last "
        "(log-probability of the label, against that after the text itself)"
    )


def _text(record: Record) -> str:
    """What is paraphrased."""
    if record.kind == "labels":
        return record.text
    return [message.content for message in record.prompt if message.role == "user"][-1]


def _load(path: str, ctx: Context) -> Bundle:
    config = replace(ctx.settings.model, path=path, revision=None)
    bundle = load_bundle(config, task="causal", quant=ctx.settings.component("quant"), device=ctx.team.device)
    if not bundle.tokenizer.chat_template:
        apply_template(bundle.tokenizer, ctx.settings.model.template)
    return bundle
