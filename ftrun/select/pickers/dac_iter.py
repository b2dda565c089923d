"""Rounds of choosing, training and looking where the model still falls short."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.data.render import Renderer
from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Budget, Picker, PlannedTraining, Table
from ftrun.select.geometry.cluster import by_content, check_kmeans, cluster_rows, embeddings_of, places_within
from ftrun.select.trials.inner import InnerTraining, prepared_rows
from ftrun.select.trials.rewards import likelihood, reward
from ftrun.select.trials.rollouts import rollouts

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.data.records import Record
    from ftrun.training.context import Context


@register("picker", "dac_iter")
@dataclass
class DacIter(Picker):
    """Random rows of clusters whose weights follow what training has not yet taught (Yu et al., 2024, arXiv:2409.11378).

    In each of T rounds budget / T rows are drawn, of cluster j in proportion to its weight w_j, without replacement. The
    base model is then trained on all rows so far and answers each of them. With s_j the mean over the cluster's rows
    of R(gold answer) - R(its own answer), the next weights are w_j = exp(s_j) / sum exp(s). Clusters start equal; one
    without a chosen row counts as the mean of the others. What a small cluster cannot give, the others give.
    R is the mean log-likelihood per token under the untrained scoring model, or a reward model. Of a conversation the
    last answer counts, all turns before it being given.
    """

    rounds: int = 3  # T
    clusters: int = 512  # K
    weighting: Literal["exp", "product"] = "exp"  # product: the new weights, as above, times those of the round before
    reward_model: str | None = None  # sequence classifier of one output that rates answers; null: likelihood
    max_new_tokens: int = 512  # longest answer that is generated
    trains: Literal["lora", "full"] = "lora"  # what the training of a round changes: adapters, or all weights
    epochs: int = 3  # of the training of a round
    learning_rate: float = 2e-4  # its peak; for trains=full rather 2e-5
    batch_size: int = 64  # rows per step, over all processes
    r: int = 16  # rank of the adapters
    embedding: Literal["minilm", "model"] = "minilm"  # all-MiniLM-L6-v2, or the mean hidden state of the scoring model
    of: Literal["prompt", "row"] = "prompt"  # text that is embedded
    iterations: int = 300  # of k-means, at most
    restarts: int = 5  # k-means runs, of which the tightest counts

    needs_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_kmeans(self.clusters, self.iterations, self.restarts)
        for name in ("rounds", "max_new_tokens", "epochs", "learning_rate", "batch_size", "r"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"dac_iter needs {name} above 0", f"select.picker.{name}={getattr(self, name)}")

    def pick(self, table: Table, candidates: np.ndarray, column: str, budget: Budget, ctx: Context) -> np.ndarray:
        assert table.pool is not None
        embeddings_of(table, ctx, self.embedding, self.of)
        rows = by_content(table, candidates, ctx, "dac_iter")
        found = cluster_rows(table, rows, self.clusters, self.iterations, self.restarts, ctx)
        label = ctx.team.gather_object(found.label)[0]  # all processes train on the same rows
        weights = np.full(int(label.max()) + 1, 1 / (int(label.max()) + 1))
        chosen = np.zeros(0, np.int64)  # positions in rows
        for number in range(1, self.rounds + 1):
            new = self._draw(label, weights, chosen, rows, table, part_of(budget, number, self.rounds))
            chosen = np.concatenate([chosen, new])
            ctx.report.note(f"round {number} of {self.rounds}: {len(new)} rows, {len(chosen)} in all")
            if number == self.rounds or len(chosen) in (0, len(rows)):
                continue
            gaps = self.gaps(table.pool.subset(table.pool.ids[rows[chosen]]), ctx)
            weights = self.reweighed(cluster_means(gaps, label[chosen], len(weights)), weights)
            ctx.report.note(f"cluster weights from {weights.min():.2g} to {weights.max():.2g}")
        return rows[chosen]

    def models(self) -> list[str]:
        return [self.reward_model] if self.reward_model else []

    def planned_trainings(self, rows: int) -> list[PlannedTraining]:
        sizes = [rows * number // self.rounds for number in range(1, self.rounds)]
        return [PlannedTraining(size, self.epochs, self.batch_size, self.trains == "full") for size in sizes if size]

    def _draw(
        self, label: np.ndarray, weights: np.ndarray, chosen: np.ndarray, rows: np.ndarray, table: Table, until: Budget
    ) -> np.ndarray:
        """Positions to add so that the rows so far come to the budget ``until``."""
        rest = np.setdiff1d(np.arange(len(label)), chosen)
        order = rest[weighted_turns(label[rest], weights)]
        together = np.concatenate([rows[chosen], rows[order]])
        return order[: max(0, len(until.take(together, table.lengths)) - len(chosen))]

    def gaps(self, chosen: Pool, ctx: Context) -> np.ndarray:
        """R(gold) - R(generated) of every row after a training on all of them, (rows,); NaN where it cannot be told."""
        prepared = prepared_rows(chosen, ctx)
        training = InnerTraining(
            self.trains,
            self.epochs,
            self.learning_rate,
            self.batch_size,
            schedule="linear",
            lora={"r": self.r, "lora_alpha": 2.0 * self.r},
            called="select.picker.",
        )
        bundle = ctx.scorer.bundle
        renderer = Renderer(bundle.tokenizer)
        prompts = [renderer.prompt_ids(record, chosen.origin(record.id)) for record in chosen]
        fits = np.isin(chosen.ids, prepared.kept)
        fits &= np.array([len(ids) + self.max_new_tokens <= bundle.context_length for ids in prompts])
        places = np.flatnonzero(fits)
        result = np.full(len(chosen), np.nan)
        if len(places) < len(chosen):
            ctx.report.note(
                f"{len(chosen) - len(places)} rows are not answered: too long, or no room for {self.max_new_tokens} tokens"
            )
        if not len(places):
            return result
        with training.trained(prepared.table, ctx, "training on the rows so far") as epoch:
            trained = replace(ctx, scoring=epoch.scoring(ctx))
            asked = [prompts[place] for place in places.tolist()]
            answers = [written[0] for written in rollouts(asked, 1, self.max_new_tokens, 0.0, trained)]
        records = [chosen[int(number)] for number in chosen.ids[places]]
        gold = [record.response for record in records]
        result[places] = self._rate(records, gold, ctx) - self._rate(records, answers, ctx)
        return result

    def _rate(self, records: list[Record], answers: list[str], ctx: Context) -> np.ndarray:
        if self.reward_model is None:
            return likelihood(records, answers, ctx)
        return reward(self.reward_model, records, answers, ctx)

    def reweighed(self, scores: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Weights of the next round from the clusters' scores, (clusters,), NaN where there is none; they sum to 1."""
        if np.isnan(scores).all():
            return before
        known = np.where(np.isnan(scores), np.nanmean(scores), scores)
        weights = np.exp(known - known.max())
        if self.weighting == "product":
            weights = weights * before
        return weights / weights.sum()


def part_of(budget: Budget, number: int, rounds: int) -> Budget:
    """What of the budget may be used up after round ``number`` of ``rounds``."""
    if budget.rows is not None:
        return Budget(rows=budget.rows * number // rounds)
    assert budget.tokens is not None
    return Budget(tokens=budget.tokens * number // rounds)


def cluster_means(gaps: np.ndarray, label: np.ndarray, clusters: int) -> np.ndarray:
    """Mean of the rows of each cluster that have a gap, (clusters,); NaN where none has."""
    known = ~np.isnan(gaps)
    count = np.bincount(label[known], minlength=clusters)
    total = np.bincount(label[known], weights=gaps[known], minlength=clusters)
    return np.divide(total, count, out=np.full(clusters, np.nan), where=count > 0)


def weighted_turns(label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Positions dealt out so that every prefix holds each cluster in proportion to its weight, (rows,).

    The k-th row of a cluster comes at (k - 1/2) / weight, which is Webster's way of sharing out seats; a cluster that
    is used up leaves its turns to the others. Within a cluster rows come as they stand, and clusters that are level
    in the order of their first row.
    """
    turn, first = places_within(label)
    with np.errstate(divide="ignore"):
        due = (turn + 0.5) / weights[label]
    return np.lexsort((first, due))
