"""The stages of a run in order: select, attach, train, evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ftrun.config.compose import Composed
from ftrun.data.pool import Pool
from ftrun.data.tokens import TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.objectives.base import Objective
from ftrun.runs.artifacts import whole_json
from ftrun.select.run import check_budget
from ftrun.select.scoring.shared import Shared
from ftrun.stages import attach, train
from ftrun.stages.evaluate import evaluate, heldout_loss
from ftrun.stages.recorded import RecordedRun, carry_out, logical_parameters
from ftrun.stages.rows import Rows
from ftrun.stages.select import select
from ftrun.stages.shape import check_fit
from ftrun.stages.trained import labels_of
from ftrun.tokens.base import TokenPolicy
from ftrun.training.context import Context
from ftrun.training.loop import Trainer
from ftrun.training.signals import StopSignals


def run(composed: Composed, verb: str, command: Sequence[str]) -> dict[str, Any]:
    """Carry out a recipe in this process (one of several, if a launcher started it) and return its summary.

    Raises FtrunError; whatever happens, summary.json says how the run ended.
    """
    settings = composed.settings
    settings.stages = ["select"] if verb == "select" else settings.stages
    return carry_out(settings, lambda ctx, signals: Chain(ctx, composed, list(command), signals))


class Chain(RecordedRun):
    """A run of one recipe: its stages, and what they share."""

    def __init__(self, ctx: Context, composed: Composed, command: Sequence[str], signals: StopSignals):
        super().__init__(ctx, composed, command, signals)
        self.objective: Objective = self.settings.component("objective")
        self.tokens: TokenPolicy = self.settings.component("tokens")
        self.rows = Rows(ctx, self.objective, self.tokens)
        self.shared: Shared | None = None  # with the selections of other recipes in the same command

    def stages(self) -> None:
        stages = self.settings.stages
        train_pool = self.rows.training()
        if "train" in stages and not self.settings.run:
            check_fit(self.settings, self.ctx)
        untouched = self.settings.choice("tokens") == "none"
        if "select" in stages and self.settings.selects:
            train_pool = self.select(train_pool)
        elif stages == ["select"] and untouched:
            raise ConfigError(
                f"recipe {self.settings.recipe} selects nothing",
                todo="Add select=superfiltering budget=0.1, or see `ftrun recipes --slot select`.",
            )
        if stages == ["select"] and untouched:
            return
        train_pool = self.rows.edit(train_pool, self.load_model)
        table = self.rows.tokenise(train_pool).table
        self.load_model(whole=self.tokens.static or self.tokens.remembers)
        table = self.rows.weigh(table, train_pool)
        self.ctx.train_tokens = table
        if "train" in stages:
            self._train(table)
        elif "eval" in stages:
            self.evaluate("final")

    def check_budget(self, pool: Pool) -> None:
        """Refuse a budget that the selection cannot work with, before any model is loaded. Raises ConfigError."""
        if "select" in self.settings.stages and self.settings.selects:
            check_budget(self.settings, len(pool))

    def select(self, pool: Pool) -> Pool:
        """The rows that the selection picks."""
        self.selected = select(pool, self.ctx, self.load_model, self.shared)
        # training shuffles by itself; ids in pool order make it independent of ties in the ranking
        return pool.subset(np.sort(self.selected))

    def load_model(self, whole: bool = True) -> None:
        """Put the model into ``ctx.bundle``, ``whole`` or in slices where the strategy of the run has them."""
        if self.ctx.bundle is not None:
            return
        classes = labels_of(Path(self.settings.run)) if self.settings.run and self.rows.labels else []
        if classes and classes != self.rows.labels:
            raise DataError(
                f"{self.settings.run} tells {len(classes)} other classes apart: {', '.join(map(str, classes[:8]))}",
                f"run={self.settings.run}",
                "Train on the same classes, or start from the base model.",
            )
        attach.load_model(self.ctx, self.classes, whole)
        assert self.ctx.bundle is not None
        self.counts["total"] = logical_parameters(self.ctx.bundle.model)

    @property
    def classes(self) -> int | None:
        """Number of classes of a classifier."""
        return len(self.rows.labels) if self.settings.task == "classify" else None

    def attach(self, table: TokenTable) -> Trainer:
        """What trains the loaded model on ``table``; the adapter is on it afterwards."""
        heldout = self.ctx.heldout_tokens
        loss = (lambda: heldout_loss(self.ctx)) if heldout is not None and len(heldout) else None
        self.trainer = attach.attach(
            table,
            self.ctx,
            self.objective,
            self.tokens,
            evaluate=loss,
            selected=self.selected is not None,
            labels=self.classes,
        )
        self.counts["trainable"] = sum(p.numel() for p in self.trainer.parameters.values() if p.requires_grad)
        return self.trainer

    def _train(self, table: TokenTable) -> None:
        settings = self.settings
        path = train.newest_checkpoint(self.ctx)
        measured = whole_json(self.ctx.out / "eval" / "before.json")
        if "eval" in settings.stages and settings.train.eval_before and not measured:
            self.evaluate("before")
        adapter, quant = settings.choice("adapter"), settings.choice("quant")
        self.report.stage("train", f"{settings.choice('objective')} with adapter={adapter}, quant={quant}")
        trainer = self.attach(table)
        if self.begun_with:
            train.check_length(trainer, self.begun_with, path, self.ctx)
            if self.ctx.team.is_main:
                self.write_settings({})
        train.train(trainer, self.ctx, self.signals, path, self.counts)
        train.save(trainer, self.ctx)
        if "eval" in settings.stages:
            self.evaluate("final")

    def evaluate(self, tag: Literal["before", "final"]) -> None:
        """Run the evaluators; their values end in the summary."""
        if self.ctx.strategy is not None:
            self.ctx.strategy.open()
        found = evaluate(self.ctx, tag)
        if tag == "before":
            self.metrics["before"] = found
        else:
            self.metrics |= found
