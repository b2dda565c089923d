"""Targeted selection by gradients."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.data.tokens import TokenTable
from ftrun.errors import ConfigError, DataError, ResourceError
from ftrun.registry import register
from ftrun.runs.memory import available_bytes
from ftrun.select.base import PlannedTraining, Scorer
from ftrun.select.geometry.gradients import GradientFeatures, Projection, joined
from ftrun.select.geometry.nearest import check_room, products
from ftrun.select.queries import Queries, load_queries
from ftrun.select.row_numbers import row_numbers
from ftrun.select.trials.inner import Epoch, InnerTraining, prepared_rows
from ftrun.training.scoring import Similarity

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context

LARGE_FROM = 10**9  # parameters of a model for which the paper's sizes are meant
KEPT_SHARE = 0.25  # of the free memory that the rows' features may hold until the pick


@register("select", "less")
@dataclass
class Less(Scorer):
    """Rows whose gradients point where those of the queries do (Xia et al., 2024, "LESS", arXiv:2402.04333).

    A LoRA warm-up on a few rows leaves a checkpoint c an epoch. There, f_c(z) is the Adam step that row z would make
    and g_c(q) the plain gradient of query q, both projected by the same random signs and of unit length.
    influence(z, q) = sum_c w_c f_c(z) . g_c(q), w_c being the mean learning rate of epoch c, normalised to sum 1.
    A row's score is the mean over the queries of a task, and of those the highest over the tasks (files of queries).
    """

    warmup_rows: float = 0.05  # share of the pool that the warm-up trains on
    epochs: int = 4  # of the warm-up, a checkpoint each
    learning_rate: float = 2e-5  # peak, of the warm-up
    batch_size: int = 32  # rows per optimiser step of the warm-up
    r: int | None = None  # rank of the warm-up's LoRA, its alpha four times that; null: 128, below 1B parameters 16
    lora_dropout: float = 0.1  # in the warm-up; gradients are taken without
    target_modules: list[str] | str = "attention"  # linears that get LoRA: kinds or names, as adapter=lora reads them
    dimension: int | None = None  # of the projection; null: 8192, below 1B parameters 1024
    row_gradient: Literal["adam", "plain"] = "adam"  # what a row is represented by: its Adam step, or its gradient

    column: ClassVar[str] = "less"
    gives_similarity: ClassVar[bool] = True

    @property
    def passes(self) -> float:  # type: ignore[override]
        return 3.0 * self.epochs  # forward and backward at every checkpoint

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Influence on the task that a row helps most, (rows,), from -1 to 1; NaN for a row that training would drop."""
        self._check()
        queries = load_queries(ctx.settings)
        small = sum(p.numel() for p in ctx.scorer.bundle.model.parameters()) < LARGE_FROM
        dimension = self.dimension or (1024 if small else 8192)
        table, places = self._rows(pool, ctx)
        wanted = self._queries(queries, ctx)
        check_room(len(queries), len(pool), ctx)
        self._check_features(len(table) + len(wanted), dimension, ctx)
        training = self._warm_up(self.r or (16 if small else 128))
        chosen = self._warm_up_rows(pool, places, ctx)
        ctx.report.note(
            f"less: warm-up on {len(chosen):,} rows with LoRA r={training.lora['r']}, "
            f"gradients projected to {dimension} numbers"
        )
        projection = Projection(dimension, ctx.seed)
        influence = np.zeros((len(queries), len(table)), np.float32)
        kept: list[np.ndarray] = []
        keeps = 4 * dimension * self.epochs * len(pool) <= KEPT_SHARE * available_bytes(ctx.team.device)
        total = 0.0
        with closing(training.run(table.rows(chosen), ctx, "warm-up for less")) as epochs:
            for epoch in epochs:
                rows = self._features(epoch, table, projection, self.row_gradient == "adam", ctx)
                targets = self._features(epoch, wanted, projection, False, ctx)
                influence += epoch.learning_rate * products(targets, rows)
                total += epoch.learning_rate
                kept += [epoch.learning_rate**0.5 * rows] if keeps else []
        if not total > 0:
            raise ConfigError("the warm-up has a learning rate of 0", f"select.learning_rate={self.learning_rate}")
        similarity = Similarity(np.zeros((len(queries), len(pool)), np.float32), queries.task)
        similarity.matrix[:, places] = influence / total
        ctx.scorer.similarity = similarity
        if keeps:
            ctx.scorer.embeddings = np.zeros((len(pool), dimension * len(kept)), np.float32)
            ctx.scorer.embeddings[places] = np.concatenate(kept, axis=1) / total**0.5
        known = np.zeros(len(pool), bool)
        known[places] = True
        return {"less": np.where(known, task_influence(similarity), np.nan)}

    def planned_trainings(self, rows: int) -> list[PlannedTraining]:
        return [PlannedTraining(max(1, round(self.warmup_rows * rows)), self.epochs, self.batch_size)]

    # ---- parts ----

    def _check(self) -> None:
        for knob in ("warmup_rows", "epochs", "batch_size", "r", "dimension"):
            value = getattr(self, knob)
            if value is not None and not value > 0:
                raise ConfigError(f"{knob} is above 0", f"select.{knob}={value}")
        if self.warmup_rows > 1:
            raise ConfigError("warmup_rows is a share of the pool", f"select.warmup_rows={self.warmup_rows}")

    def _check_features(self, rows: int, dimension: int, ctx: Context) -> None:
        size, free = 8 * rows * dimension, available_bytes(ctx.team.device)  # as they are measured, and as a matrix
        if size > free and ctx.team.device.type == "cpu":
            raise ResourceError(
                f"the projected gradients of {rows:,} rows take {size / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free",
                f"select.dimension={dimension}",
                "Lower select.dimension, or select from the pool in parts.",
            )

    def _rows(self, pool: Pool, ctx: Context) -> tuple[TokenTable, np.ndarray]:
        """The pool as it would be trained, and the place in the pool of every row of that table."""
        prepared = prepared_rows(pool, ctx)
        place = {number: place for place, number in enumerate(pool.ids.tolist())}
        for reason, ids in prepared.dropped.items():
            ctx.scorer.reasons |= {place[number]: reason for number in ids}
        return prepared.table, np.array([place[number] for number in prepared.table.record.tolist()], np.int64)

    def _queries(self, queries: Queries, ctx: Context) -> TokenTable:
        tables = []
        for path, pool in zip(ctx.settings.select.queries, queries.pools, strict=True):
            prepared = prepared_rows(pool, ctx)
            for reason, ids in prepared.dropped.items():
                raise DataError(
                    f"{len(ids)} queries have no gradient: {reason}", path, "Leave them out, or raise data.max_length."
                )
            tables.append(prepared.table)
        return joined(tables)

    def _warm_up(self, rank: int) -> InnerTraining:
        return InnerTraining(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            schedule="linear",
            warmup=0.03,
            lora={
                "r": rank,
                "lora_alpha": 4.0 * rank,
                "lora_dropout": self.lora_dropout,
                "target_modules": self.target_modules,
            },
        )

    def _warm_up_rows(self, pool: Pool, places: np.ndarray, ctx: Context) -> np.ndarray:
        """Rows of the table, drawn by content."""
        numbers = row_numbers(pool, ctx.seed, "less")[places]
        return np.argsort(numbers, kind="stable")[: max(1, round(self.warmup_rows * len(places)))]

    def _features(
        self, epoch: Epoch, table: TokenTable, projection: Projection, adam: bool, ctx: Context
    ) -> np.ndarray:
        """Of every row of the table, (rows, dimension) float32."""
        measure = GradientFeatures(table, epoch.checkpoint(), projection, adam)
        scoring = epoch.scoring(ctx)
        # large batches, though rows pass the model one at a time: making the signs is worth it for many rows only
        scoring = replace(scoring, batch_tokens=measure.rows_at_once * int(-(-table.lengths.max() // 16) * 16))
        name = f"{'step' if adam else 'gradient'}-{projection.dimension}-{projection.seed}"
        vectors = scoring.measure(table, name, measure, f"gradients, epoch {epoch.number} of {self.epochs}")
        return np.stack(vectors)


def task_influence(similarity: Similarity) -> np.ndarray:
    """Mean over the queries of each task, of those the highest, (rows,) float64."""
    tasks = np.unique(similarity.task)
    return np.max([similarity.matrix[similarity.task == task].mean(axis=0, dtype=np.float64) for task in tasks], axis=0)
