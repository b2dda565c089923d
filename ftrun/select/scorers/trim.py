"""Selection by tokens that are represented as the salient tokens of a few target rows are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.models.attention import states_and_maps
from ftrun.registry import register
from ftrun.runs.artifacts import digest
from ftrun.select.base import PlannedTraining, Scorer
from ftrun.select.queries import load_queries
from ftrun.select.row_numbers import row_numbers
from ftrun.select.scoring.texts import Turns, read_turns
from ftrun.select.scoring.token_scores import Scored, write_token_scores
from ftrun.select.trials.inner import InnerTraining, prepared_rows
from ftrun.training.scoring import Similarity

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.data.pool import Pool
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context
    from ftrun.training.scoring import Scoring

EPSILON = 1e-12
NEAREST_AT_ONCE = 4096  # classes whose nearest known class is looked for at one time


@register("select", "trim")
@dataclass
class Trim(Scorer):
    """Token-wise fingerprints of a few target rows (Nagaraj et al., 2025, "TRIM", arXiv:2510.07118).

    A target token i is as salient as its attention is sharp and as it is attended to, over the heads of the last layers:

        Q_i = 1 - entropy(row i) / log(i)       K_i = mean of column i over the queries that see it, the highest being 1
        alpha_i = (Q_i + K_i) / 2

    The fingerprint of a token class t, an id of the vocabulary, is the sum over its target tokens of alpha_i h_i / ||h_i||,
    scaled to length 1, with h the last hidden states. A token of the pool scores cos(h_i, fingerprint of its class); a
    class without one takes the nearest class by input embedding, times ``penalty``. The score of a row is the mean and
    the highest of its tokens' scores, half each. Each file of ``select.queries`` is a task; a row counts by its best task.
    """

    layers: int = 4  # last layers whose attention counts
    penalty: float = 0.5  # factor for tokens whose class is in no target row
    scope: Literal["all", "prompt", "response"] = "all"  # tokens that count, in target rows and in the pool
    top_share: float = 0.5  # share of the highest token score in a row's score; the rest is their mean
    targets: int = 10  # rows of each query file that are looked at, drawn by content
    warmup: float = 0.05  # share of the pool that the scoring model learns first; 0: none
    warmup_epochs: int = 1  # passes over those rows
    warmup_learning_rate: float = 2e-4  # of the adapters that learn them
    template: Literal["plain", "alpaca", "chat"] = "plain"  # layout of the prompt; plain: lines without any markup
    max_length: int = 2048  # tokens of prompt and response that are scored

    column: ClassVar[str] = "trim"
    passes: ClassVar[float] = 1.0
    gives_similarity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("layers", "targets", "warmup_epochs", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"select.{name} must be at least 1", f"select.{name}={getattr(self, name)}")
        if not self.warmup_learning_rate > 0:
            where = f"select.warmup_learning_rate={self.warmup_learning_rate}"
            raise ConfigError("select.warmup_learning_rate must be above 0", where)
        for name in ("penalty", "top_share", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"select.{name} lies between 0 and 1", f"select.{name}={getattr(self, name)}")

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Row scores, and their two parts for the task that gives them, (rows,); NaN for a row without tokens that count."""
        queries = load_queries(ctx.settings)
        turns = read_turns(pool, ctx, self.template)
        table, owner, reasons = self._sequences(turns, ctx, len(pool))
        ctx.scorer.reasons |= reasons
        with self._warmed(pool, ctx) as scoring:
            prints = [self._fingerprints(self._drawn(task, ctx), scoring, ctx) for task in queries.pools]
            scores = self._token_scores(table, prints, scoring)
        mean = np.full((len(prints), len(turns.row)), np.nan)
        top = mean.copy()
        for place, values in zip(owner.tolist(), scores, strict=True):
            by_task = values.astype(np.float64).reshape(-1, len(prints))
            mean[:, place], top[:, place] = by_task.mean(axis=0), by_task.max(axis=0)
        parts = {"trim": (1 - self.top_share) * mean + self.top_share * top, "mean": mean, "top": top}
        rows = {name: np.stack([turns.row_mean(task, len(pool)) for task in part]) for name, part in parts.items()}
        ctx.scorer.similarity = Similarity(rows["trim"], np.arange(len(prints)))
        best = np.where(np.isnan(rows["trim"]), -np.inf, rows["trim"]).argmax(axis=0)
        write_token_scores(self._scored(table, scores, turns, best, pool), ctx)
        return {name: part[best, np.arange(len(pool))] for name, part in rows.items()}

    def planned_trainings(self, rows: int) -> list[PlannedTraining]:
        if not self.warmup:
            return []
        training = self._warm_up()
        return [PlannedTraining(max(1, round(self.warmup * rows)), training.epochs, training.batch_size)]

    def _scored(
        self, table: TokenTable, scores: list[np.ndarray], turns: Turns, best: np.ndarray, pool: Pool
    ) -> Iterator[Scored]:
        """Scores of the tokens that count for the task by which their row counts, (rows,) in ``best``."""
        starts = turns.starts
        for index, values in enumerate(scores):
            text = table.sequence(index)
            row = int(turns.row[text.record])
            position = np.flatnonzero(text.loss_weight > 0)
            of_task = values.reshape(len(position), -1)[:, best[row]]
            yield Scored(int(pool.ids[row]), int(starts[text.record]), position, text.input_ids[position], of_task)

    def _drawn(self, task: Pool, ctx: Context) -> Pool:
        """The target rows of a task."""
        if len(task) > self.targets:
            ctx.report.note(f"{self.targets} of {len(task)} query rows make the fingerprints (select.targets)")
        first = np.argsort(row_numbers(task, ctx.seed, "trim targets"), kind="stable")[: self.targets]
        return task.subset(task.ids[np.sort(first)])

    def _warm_up(self) -> InnerTraining:
        return InnerTraining(
            epochs=self.warmup_epochs, learning_rate=self.warmup_learning_rate, called="select.warmup_"
        )

    @contextmanager
    def _warmed(self, pool: Pool, ctx: Context) -> Iterator[Scoring]:
        """The engine for the model after a short training on a random part of the pool."""
        if not self.warmup:
            yield ctx.scorer
            return
        count = max(1, round(self.warmup * len(pool)))
        drawn = np.argsort(row_numbers(pool, ctx.seed, "trim warm-up"), kind="stable")[:count]
        prepared = prepared_rows(pool.subset(pool.ids[np.sort(drawn)]), ctx)
        with self._warm_up().trained(prepared.table, ctx, f"warm up on {count:,} rows") as epoch:
            yield epoch.scoring(ctx)

    def _sequences(self, turns: Turns, ctx: Context, rows: int) -> tuple[TokenTable, np.ndarray, dict[int, str]]:
        """Every turn with tokens that count, marked by a weight of 1; its number, (sequences,); why rows have none."""
        added = ctx.scorer.tokenizer.added_tokens_decoder.items()
        special = {*ctx.scorer.tokenizer.all_special_ids, *(number for number, token in added if token.special)}
        limit = min(self.max_length, ctx.scorer.bundle.context_length)
        reasons = dict.fromkeys(range(rows), "no response")
        made, owner, cut = [], [], 0
        for turn, row in enumerate(turns.row.tolist()):
            prompt, response = turns.prompt[turn], turns.response[turn]
            ids = [*prompt, *response][:limit]
            cut += len(ids) < len(prompt) + len(response)
            counts = np.array([token not in special for token in ids], np.float32)
            counts[:1] = 0  # attention rests on the first token, whatever it is, and entropy over one key says nothing
            if self.scope == "prompt":
                counts[len(prompt) :] = 0
            if self.scope == "response":
                counts[: len(prompt)] = 0
            if counts.any():
                made.append(Sequence(np.array(ids, np.int32), counts, turn))
                owner.append(turn)
                reasons[row] = ""
            elif reasons[row] == "no response":
                reasons[row] = f"no token of the {self.scope} counts within max_length={limit}"
        if cut:
            ctx.report.note(f"{cut} of {len(turns.row)} texts are read up to {limit} tokens only")
        without = {row: reason for row, reason in reasons.items() if reason}
        return TokenTable.from_sequences(made), np.array(owner, np.int64), without

    def _fingerprints(self, task: Pool, scoring: Scoring, ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        """Token classes of the target rows, (classes,), and their fingerprints, (classes, width)."""
        table = self._sequences(read_turns(task, ctx, self.template), ctx, len(task))[0]
        if not len(table):
            raise DataError(
                "the target rows hold no token that counts", f"select.queries: {len(task)} rows, scope={self.scope}"
            )
        if self.layers > len(scoring.bundle.architecture.layers):
            ctx.report.note(f"the model has {len(scoring.bundle.architecture.layers)} layers: all of them count")
        found = scoring.measure(table, f"saliency{self.layers}", self._salient_states, "look at target rows")
        width = scoring.bundle.architecture.width
        counted = table.loss_weight > 0
        weighted = np.concatenate([states.reshape(-1, width) for states in found]).astype(np.float64)
        classes, number = np.unique(table.input_ids[counted], return_inverse=True)
        sums = np.zeros((len(classes), width))
        np.add.at(sums, number, weighted)
        return classes, sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), EPSILON)

    def _salient_states(self, bundle: Bundle, batch: Batch) -> list[np.ndarray]:
        """alpha_i h_i / ||h_i|| of the tokens that count, one flat array a sequence."""
        lengths = (batch.sequence >= 0).sum(1).tolist()
        totals = [torch.zeros(length, device=bundle.device) for length in lengths]
        layers = min(self.layers, len(bundle.architecture.layers))

        def look(maps: Tensor) -> None:
            for row, length in enumerate(lengths):
                totals[row] += saliency(maps[row, :, :length, :length].float()) / layers

        states = F.normalize(states_and_maps(bundle, batch, layers, look).float(), dim=-1)
        taken = []
        for row, alpha in enumerate(totals):
            counts = batch.loss_weight[row, : len(alpha)] > 0
            taken.append((alpha[:, None] * states[row, : len(alpha)])[counts].cpu().numpy())
        return taken

    def _token_scores(
        self, table: TokenTable, prints: list[tuple[np.ndarray, np.ndarray]], scoring: Scoring
    ) -> list[np.ndarray]:
        """Scores of the tokens that count, by task, one flat array (tokens x tasks) a sequence."""
        if not len(table):
            return []
        classes = np.unique(table.input_ids)
        tasks = [self._matched(classes, *known, scoring.bundle) for known in prints]

        def compute(bundle: Bundle, batch: Batch) -> list[np.ndarray]:
            counts = (batch.loss_weight > 0) & (batch.sequence >= 0)
            states = F.normalize(bundle.architecture.hidden_states(bundle.model, batch)[counts].float(), dim=-1)
            ids = batch.input_ids[counts]
            by_task = [(states * matrix[place[ids]]).sum(-1) * factor[ids] for matrix, place, factor in tasks]
            scores = torch.stack(by_task, dim=1).cpu().numpy()
            sizes = torch.bincount(batch.sequence[counts], minlength=batch.sequences).cpu().numpy()
            return np.split(scores, np.cumsum(sizes)[:-1])

        name = f"trim-{digest([_hash(part.cpu().numpy()) for task in tasks for part in task])}"
        return scoring.measure(table, name, compute, "compare tokens with fingerprints", packable=True)

    def _matched(
        self, classes: np.ndarray, known: np.ndarray, prints: np.ndarray, bundle: Bundle
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fingerprints (known, width) float32; which of them counts for a token, and its factor, (vocabulary,) both.

        Only ``classes``, those of the pool, are filled in. There are few fingerprints and many classes: none is copied.
        """
        model: Any = bundle.model
        embedding = model.get_input_embeddings().weight.detach()
        targets = F.normalize(embedding[torch.from_numpy(known.astype(np.int64)).to(embedding.device)].float(), dim=-1)
        ids = torch.from_numpy(classes.astype(np.int64)).to(embedding.device)
        nearest = torch.cat(
            [
                (F.normalize(embedding[part].float(), dim=-1) @ targets.T).argmax(1)
                for part in ids.split(NEAREST_AT_ONCE)
            ]
        )
        has_own = np.isin(classes, known)
        place = torch.zeros(bundle.architecture.vocabulary, dtype=torch.long)
        factor = torch.full((bundle.architecture.vocabulary,), self.penalty)
        place[ids.cpu()] = nearest.cpu()
        own = torch.from_numpy(classes[has_own].astype(np.int64))
        place[own], factor[own] = torch.from_numpy(np.searchsorted(known, classes[has_own])), 1.0
        matrix = torch.from_numpy(prints.astype(np.float32))
        return matrix.to(bundle.device), place.to(bundle.device), factor.to(bundle.device)


def _hash(values: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).hexdigest()


def saliency(attention: Tensor) -> Tensor:
    """(Q + K) / 2 of every token, mean over the heads, (time,), from causal maps (heads, time, time); 0 for the first."""
    alpha = ((sharpness(attention) + received(attention)) / 2).mean(0)
    return F.pad(alpha, (1, 0))[: attention.shape[1]]


def sharpness(attention: Tensor) -> Tensor:
    """Q of every token but the first, (heads, time - 1): 0 where it attends to all it sees alike, 1 where to one alone."""
    entropy = -(attention * (attention + EPSILON).log()).sum(-1)[:, 1:]
    return 1 - entropy / torch.arange(2, attention.shape[1] + 1, device=attention.device).log()


def received(attention: Tensor) -> Tensor:
    """K of every token but the first, (heads, time - 1): mean attention of the tokens that see it, the highest being 1."""
    seen_by = torch.arange(attention.shape[1], 0, -1, device=attention.device)
    mean = (attention.sum(1) / seen_by)[:, 1:]
    return mean / mean.amax(1, keepdim=True).clamp(min=EPSILON) if mean.shape[1] else mean
