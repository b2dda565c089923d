"""A paraphraser that learns which paraphrases help a frozen classifier, and what it then writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper

from ftrun.data.batches import Batch, collate
from ftrun.data.render import Renderer
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import DataError
from ftrun.models.generation import OwnNoise, Writer, stop_ids
from ftrun.models.inference import evaluating
from ftrun.objectives.base import Kind, Objective
from ftrun.select.trials.inner import InnerTraining
from ftrun.training.parts import Loss
from ftrun.training.scoring import Scoring, segments
from ftrun.training.view import StepView

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

EPSILON = 1e-12  # added to the standard deviation of the rewards


@dataclass
class Example:
    """A row as the two models see it."""

    text: str
    request: list[int]  # prompt (token ids) that asks the paraphraser for another form of the text
    classified: Callable[[str], Sequence]  # the classifier's sequence with another text; its answer carries loss
    where: str  # for errors


@dataclass
class Drafts:
    """How paraphrases are drawn: half of them sampled from the top-p tokens, the other half by diverse beams."""

    count: int = 8  # paraphrases of a text (m)
    top_p: float = 0.99
    diversity: float = 1.0
    max_new_tokens: int = 64

    def draw(self, bundle: Bundle, requests: list[list[int]], step: int, seed: int) -> list[list[list[int]]]:
        """Token ids of ``count`` paraphrases of every request, each up to and with the token that ends it.

        The samples follow from seed, step, number and request, whatever else is in the batch.
        """
        stops = stop_ids(bundle, Renderer(bundle.tokenizer))
        samples = self.count - self.count // 2
        noise = OwnNoise([[step, number, *request] for request in requests for number in range(samples)], 1.0, seed)
        beams = DiverseBeams(self.count // 2, self.diversity, stops)
        begun = [request for request in requests for _ in range(self.count)]
        choice = SampledAndSearched(samples, self.count, [TopPLogitsWarper(self.top_p), noise], beams)
        written = Writer(max_new_tokens=self.max_new_tokens).generate(bundle, begun, stops, seed, [choice])
        return [written[at : at + self.count] for at in range(0, len(written), self.count)]


class SampledAndSearched(LogitsProcessor):
    """Of ``count`` neighbouring rows on one prompt the first ``samples`` are sampled, the others are searched for."""

    def __init__(self, samples: int, count: int, sampling: list[LogitsProcessor], search: DiverseBeams):
        self.samples, self.count, self.sampling, self.search = samples, count, sampling, search

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        ids, all_scores = (part.reshape(-1, self.count, part.shape[-1]) for part in (input_ids, scores))
        sampled = all_scores[:, : self.samples].flatten(0, 1)
        for change in self.sampling:
            sampled = change(ids[:, : self.samples].flatten(0, 1), sampled)  # type: ignore[arg-type]
        searched = self.search(ids[:, self.samples :].flatten(0, 1), all_scores[:, self.samples :].flatten(0, 1))
        parts = [part.reshape(len(ids), -1, scores.shape[-1]) for part in (sampled, searched)]
        return torch.cat(parts, 1).flatten(0, 1)


class DiverseBeams(LogitsProcessor):
    """Diverse beam search with groups of one beam (Vijayakumar et al., 2018, arXiv:1610.02424).

    ``groups`` neighbouring rows write greedily on one prompt. Each pays ``penalty`` for a token as often as the groups
    before it have taken it at the same step; finished groups take none.
    """

    def __init__(self, groups: int, penalty: float, stops: list[int]):
        self.groups, self.penalty, self.stops = groups, penalty, stops
        self.done: Tensor | None = None  # (prompts, groups)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        scores = scores.reshape(-1, self.groups, scores.shape[-1]).clone()
        if self.done is None:
            self.done = torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device)
        else:
            stops = torch.tensor(self.stops, device=scores.device)
            self.done |= torch.isin(input_ids[:, -1], stops).reshape(self.done.shape)
        taken = torch.zeros_like(scores[:, 0])
        for group in range(self.groups):
            scores[:, group] -= self.penalty * taken
            chosen = scores[:, group].argmax(dim=1, keepdim=True)
            taken.scatter_add_(1, chosen, (~self.done[:, group, None]).to(taken))
        return scores.flatten(0, 1)


def z_scored(rewards: Tensor) -> Tensor:
    """Rewards (rows, m) with mean 0 and sample deviation 1 in each row; all 0 where they are equal. No gradient."""
    rewards = (rewards - rewards[:, :1]).detach().double()
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + EPSILON)


def mml_loss(log_p: Tensor, rewards: Tensor) -> Tensor:
    """``-log sum_z P(z|x) exp(rz)`` of every row, (rows,), from log P(z|x) and rewards r, (rows, m) each."""
    return -torch.logsumexp(log_p + z_scored(rewards).to(log_p), dim=1)


def kl_penalty(log_p: Tensor, log_initial: Tensor) -> Tensor:
    """``mean_z sg[log P - log P_init + 1] log P`` of every row, (rows,): its gradient is that of KL(P, P_init)."""
    return ((log_p - log_initial).detach() + 1).mul(log_p).mean(dim=1)


def log_likelihoods(bundle: Bundle, table: TokenTable) -> Tensor:
    """Summed log-probability of the trained tokens of every sequence, (sequences,), in one batch."""
    batch = collate(table, [[index] for index in range(len(table))], bundle.pad_id).to(bundle.device)
    view = StepView(bundle.model, bundle.architecture, batch)
    return -view.per_sequence_sum(view.token_nll.float())


@dataclass
class RewardedParaphrases(Objective):
    """The loss of the paraphraser, a mean over rows: ``mml + kl * penalty``; the classifier only gives rewards.

    ``r = log P_lm(y|z) - log P_lm(y|x)`` for m paraphrases z of x that the paraphraser draws in each step. Without its
    adapter the paraphraser is the initial one; where it shares its weights with the classifier, that is the classifier.
    """

    kind: ClassVar[Kind] = "sft"

    examples: list[Example]
    classifier: Bundle
    drafts: Drafts
    kl: float

    def attach(self, bundle: Bundle, ctx: Context) -> None:
        assert ctx.train_tokens is not None
        self.paraphraser, self.seed = bundle, ctx.seed
        self.number_of = np.asarray(ctx.train_tokens.record)

    def count(self, batch: Batch) -> float:
        return float(batch.rows)

    def loss(self, view: StepView) -> Loss:
        asked = [self.examples[self.number_of[index]] for index in view.batch.table_index.tolist()]
        model: Any = self.paraphraser.model
        with evaluating(model):
            drafts = self.drafts.draw(self.paraphraser, [example.request for example in asked], view.step, self.seed)
            written = segments((e.request, ids) for e, group in zip(asked, drafts, strict=True) for ids in group)
            with model.disable_adapter():
                log_initial = log_likelihoods(self.paraphraser, written).reshape(len(asked), -1)
                rewards = self.rewards(asked, drafts)
        log_p = log_likelihoods(self.paraphraser, written).reshape(len(asked), -1)
        mml, penalty = mml_loss(log_p, rewards), kl_penalty(log_p, log_initial)
        parts = {"reward": rewards.mean(1), "mml": mml, "log_ratio": (log_p - log_initial).mean(1)}
        return Loss((mml + self.kl * penalty).sum(), {name: part.detach().sum() for name, part in parts.items()})

    def rewards(self, asked: list[Example], drafts: list[list[list[int]]]) -> Tensor:
        """r of every paraphrase, (rows, m)."""
        sequences = []
        for example, group in zip(asked, drafts, strict=True):
            texts = [example.text, *(text_of_ids(self.paraphraser, ids) for ids in group)]
            sequences += [example.classified(text) for text in texts]
        log_y = log_likelihoods(self.classifier, TokenTable.from_sequences(sequences)).reshape(len(asked), -1)
        return (log_y[:, 1:] - log_y[:, :1]).to(self.paraphraser.device)


@dataclass
class ParaphraserTraining(InnerTraining):
    """Trains a LoRA adapter of the paraphraser on rewards."""

    drafts: Drafts = field(default_factory=Drafts)
    kl: float = 0.1
    classifies: str = ""  # hash of the classifier and of what it reads

    def rewarded(self, examples: list[Example], classifier: Bundle) -> ParaphraserTraining:
        """This training with the classifier that rewards it; row n of its table is example n."""
        self._objective = RewardedParaphrases(examples, classifier, self.drafts, self.kl)
        return self

    def objective(self) -> Objective:
        return self._objective


def text_of_ids(bundle: Bundle, ids: list[int]) -> str:
    stops = stop_ids(bundle, Renderer(bundle.tokenizer))
    return bundle.tokenizer.decode([id for id in ids if id not in stops], skip_special_tokens=True).strip()


def paraphrases(examples: list[Example], engine: Scoring, drafts: Drafts, seed: int) -> list[list[str]]:
    """``drafts.count`` paraphrases of every example by the engine's model; equal requests get equal ones."""

    def write(bundle: Bundle, batch: Batch) -> list[np.ndarray]:
        requests = [batch.input_ids[row][real].tolist() for row, real in enumerate(batch.sequence >= 0)]
        found = drafts.draw(bundle, requests, -1, seed)
        return [np.array([number for ids in group for number in (len(ids), *ids)]) for group in found]

    requests = [np.array(example.request, np.int32) for example in examples]
    table = TokenTable.from_sequences(
        [Sequence(ids, np.ones(len(ids), np.float32), number) for number, ids in enumerate(requests)]
    )
    name = f"paraphrases-{drafts.count}-{drafts.top_p:g}-{drafts.diversity:g}-{drafts.max_new_tokens}-{seed}"
    flat = engine.measure(table, name, write, "write paraphrases")
    return [[text_of_ids(engine.bundle, ids) for ids in _unpacked(values)] for values in flat]


def _unpacked(values: np.ndarray) -> list[list[int]]:
    """Lists that stand one after the other, each behind its length."""
    found, at = [], 0
    while at < len(values):
        end = at + 1 + int(values[at])
        found.append([int(value) for value in values[at + 1 : end]])
        at = end
    return found


def check_room(examples: list[Example], paraphraser: Bundle, classifier: Bundle, drafts: Drafts) -> None:
    """Raise DataError for a row that leaves no room for a paraphrase in a model's context."""
    for example in examples:
        pairs = ((paraphraser, example.request), (classifier, example.classified(example.text).input_ids))
        for bundle, ids in pairs:
            if len(ids) + drafts.max_new_tokens > bundle.context_length:
                raise DataError(
                    f"{len(ids)} tokens and {drafts.max_new_tokens} more for a paraphrase are more than the "
                    f"{bundle.context_length} that {bundle.path} can attend to",
                    example.where,
                    "Lower tokens.max_new_tokens, or leave out such rows.",
                )
