"""What a running component may ask for: the settings, the run folder, the other processes, and the user's ear."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ftrun.config.settings import Settings
    from ftrun.data.batches import Batch
    from ftrun.data.pool import Pool
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.runs.progress import Reporter
    from ftrun.training.distributed import Team
    from ftrun.training.parts import Attached
    from ftrun.training.scoring import Scoring
    from ftrun.training.strategies.base import Strategy


@dataclass
class Context:
    settings: Settings
    out: Path  # the run folder
    team: Team  # the processes of this run: rank, world_size, barrier, all_reduce, gather
    report: Reporter  # progress and messages for people, on standard error and in ftrun.log
    strategy: Strategy | None = None  # how the processes share the model, and the steps of its training
    adapter: Attached | None = None  # where it was put on with the model: that of the run that this one goes on from
    bundle: Bundle | None = None  # the run's model; a stage that needs it loads it through stages/attach.py
    heldout: Pool | None = None  # rows kept for evaluation
    heldout_tokens: TokenTable | None = None
    train_tokens: TokenTable | None = None
    scoring: Scoring | None = None  # scores texts with the selection's model; set by the select stage
    facts: dict[str, Any] = field(default_factory=dict)  # what ends in lock.json and the report
    selects_in: str = "selection"  # folder below out; with several recipes each selects in one of its own
    evaluates_in: str = "eval"  # folder below out; an evaluation of other rows than the run's own has one of its own
    begin: list[np.ndarray] = field(default_factory=list)  # rows of the first passes, where the selection orders them

    def calibration(self, batches: int) -> list[Batch]:
        """The first micro-batches of training, for methods that look at data before they start.

        Raises ComponentError outside a training run.
        """
        from ftrun.data.batches import Plan, micro_batches, token_budget
        from ftrun.errors import ComponentError

        if self.train_tokens is None or self.bundle is None:
            raise ComponentError("this method looks at training rows before it starts, and there are none here")
        train = self.settings.train
        rows = len(self.train_tokens)
        plan = Plan.of(rows, train.batch_size, train.epochs, train.max_steps, self.seed, begin=self.begin)
        budget = token_budget(train.batch_tokens, self.bundle.device)
        found: list[Batch] = []
        step = 0
        while len(found) < batches and step < plan.steps:
            found += micro_batches(self.train_tokens, plan.step(step), budget, False, self.bundle.pad_id)
            step += 1
        return [batch.to(self.bundle.device) for batch in found[:batches]]

    def planned_steps(self) -> int | None:
        """Optimiser steps of the whole run; None where its rows are not known yet."""
        from ftrun.data.batches import Plan

        if self.train_tokens is None:
            return self.settings.train.max_steps
        train, rows = self.settings.train, len(self.train_tokens)
        return Plan.of(rows, train.batch_size, train.epochs, train.max_steps, self.seed, begin=self.begin).steps

    @property
    def selection(self) -> Path:
        """Where the selection stage writes."""
        return self.out / self.selects_in

    @property
    def evaluation(self) -> Path:
        """Where results and predictions go."""
        return self.out / self.evaluates_in

    @property
    def scorer(self) -> Scoring:
        """The engine that scores texts. Raises ComponentError outside a selection."""
        from ftrun.errors import ComponentError

        if self.scoring is None:
            raise ComponentError("this method scores texts with a model, and no selection is running")
        return self.scoring

    @property
    def seed(self) -> int:
        return self.settings.seed
