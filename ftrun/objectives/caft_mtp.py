"""Concept-aware fine-tuning: the next token, and a little of those after it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftrun.config.settings import Settings
from ftrun.data.batches import Batch
from ftrun.data.pool import load_pool
from ftrun.errors import ConfigError, DataError
from ftrun.models.wrappers import adds_virtual_tokens
from ftrun.objectives.base import TokenLoss
from ftrun.objectives.heads.future_heads import FutureHeads, HeadTraining, watched_layers
from ftrun.registry import register
from ftrun.runs import stagecache
from ftrun.runs.artifacts import cache_dir
from ftrun.select.trials.inner import prepared_rows
from ftrun.training.parts import Loss
from ftrun.training.scoring import Scoring
from ftrun.training.view import StepView

if TYPE_CHECKING:
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.runs.progress import Reporter
    from ftrun.training.context import Context

FILE = "heads.safetensors"
FEW = 50  # tokens whose mean loss says little about a head


@register("objective", "caft_mtp")
@dataclass
class CaftMtp(TokenLoss):
    """Multi-token prediction while fine-tuning (Chen et al., 2025, arXiv:2506.07833).

    ``L = CE_0 + sum_i c * decay^i * s(step) * CE_i`` over the heads i = 1..n, ``s = sin((T - step) / T * pi / 2)``.
    CE_i is the mean loss of token t + 1 + i as head i predicts it at position t. A head is one decoder layer, at first
    a copy of the model's last but one, before the model's own vocabulary head. The heads are trained alone first, on
    general rows (A) and on the task's rows (B), with the model frozen; then (C) they are frozen and the model trains.
    They are thrown away in the end.
    """

    needs: ClassVar[dict[str, str]] = {
        "trainable_base": "trains copies of a layer of the base weights",
        "whole_weights": "trains its heads on the model before the adapter is there",
    }

    heads: int = 4  # tokens predicted beyond the next one (n)
    weight: float = 0.01  # of the heads' losses (c)
    decay: float = 0.8  # weight of a head against the one before
    weight_schedule: Literal["rsine", "constant"] = "rsine"  # s(step): from 1 down to 0, or 1
    head_input: Literal["final", "penultimate"] = "final"  # states that the heads read in stage C
    finetune_heads: bool = False  # the heads go on training in stage C
    trained_heads: str | None = None  # run folder whose trained heads are the start, instead of stage A
    general_data: str | None = None  # rows of stage A; null: no stage A
    general_epochs: float = 5  # of stage A
    task_epochs: float = 1  # of stage B, on the rows of the task; 0: no stage B
    heads_learning_rate: float = 1e-4  # peak, of stages A and B
    heads_batch_size: int = 32  # rows per optimiser step of stages A and B
    heads_max_steps: int | None = None  # stop each of the stages A and B after this many steps

    def __post_init__(self) -> None:
        self._report: Reporter | None = None  # until it has been told of doubtful heads
        if self.heads < 1 or self.heads_batch_size < 1:
            raise ConfigError(
                "objective.heads and objective.heads_batch_size are at least 1",
                f"objective.heads={self.heads} objective.heads_batch_size={self.heads_batch_size}",
            )
        if self.weight < 0 or self.decay <= 0 or self.general_epochs < 0 or self.task_epochs < 0:
            raise ConfigError(
                "objective.weight and the epochs are at least 0, objective.decay is above 0",
                f"objective.weight={self.weight:g} objective.decay={self.decay:g} objective.general_epochs="
                f"{self.general_epochs:g} objective.task_epochs={self.task_epochs:g}",
            )
        if self.trained_heads is not None and self.general_data is not None:
            raise ConfigError(
                "trained heads need no stage A",
                "objective.trained_heads objective.general_data",
                "Give one of them.",
            )

    def check(self, settings: Settings) -> None:
        super().check(settings)
        policy = settings.component("tokens")
        if policy.dynamic or policy.arranges:
            name = settings.choice("tokens")
            raise ConfigError(
                f"tokens={name} works inside the step, and objective=caft_mtp predicts tokens that it does not know of",
                f"tokens={name} objective=caft_mtp",
                "Use a policy that weighs before training, such as token_cleaning, or objective=sft.",
            )

    def attach(self, bundle: Bundle, ctx: Context) -> nn.Module:
        if adds_virtual_tokens(bundle.model):
            raise ConfigError(
                "the heads of caft_mtp cannot stand behind virtual tokens",
                f"adapter={ctx.settings.choice('adapter')}",
                "Use adapter=lora.",
            )
        self._report = ctx.report
        self.future = FutureHeads(bundle.architecture, self.heads).to(bundle.device)
        self._train_heads(bundle, ctx)
        self.future.requires_grad_(self.finetune_heads)
        return self.future

    def counts(self, batch: Batch) -> dict[str, float]:
        return self.future.counts(batch)

    def loss(self, view: StepView) -> Loss:
        with watched_layers(view.architecture) as seen:
            states = view.states
        ce_0 = super().loss(view).value
        strength = self.weight * self.shape(view.step, view.steps)  # c * s(step)
        if strength == 0:
            return Loss(ce_0, {"ce_0": ce_0})
        assert seen.penultimate is not None
        given = states if self.head_input == "final" else seen.penultimate
        value, parts = ce_0, {"ce_0": ce_0}
        for i, ce_i in enumerate(self.future.losses(view, given, seen), 1):
            value = value + strength * self.decay**i * ce_i
            parts[f"ce_{i}"] = ce_i
            self._doubt(i, ce_i, view)
        return Loss(value, parts)

    def _doubt(self, head: int, ce: Tensor, view: StepView) -> None:
        """Say once that a head predicts worse than chance, as one does that was hardly trained."""
        if self._report is None:
            return
        name, chance = f"head_{head}", math.log(view.architecture.vocabulary)
        tokens = self.future.counts(view.batch)[name]
        if tokens < FEW:
            return
        # the mean over this micro-batch; ``ce`` is its share of the mean over the step, times view.counts["loss"]
        mean_loss = float(ce.detach()) * view.counts[name] / (tokens * view.counts["loss"])
        if mean_loss > chance:
            report, self._report = self._report, None
            report.warn(
                f"head {head} of caft_mtp has a loss of {mean_loss:.3g}, chance has {chance:.3g}: it pulls "
                "the model the wrong way. Train the heads longer: objective.general_data, objective.task_epochs"
            )

    def shape(self, step: int, steps: int) -> float:
        """s(step)."""
        return math.sin((steps - step) / steps * math.pi / 2) if self.weight_schedule == "rsine" else 1.0

    # ---- stages A and B ----

    def _train_heads(self, bundle: Bundle, ctx: Context) -> None:
        folder = ctx.out / "train" / "heads"
        if self.trained_heads is not None:
            self._load(Path(self.trained_heads).expanduser() / "train" / "heads" / FILE)
        elif self.general_data is not None:
            self._general_stage(self.general_data, bundle, ctx, folder)
        if self.task_epochs:
            assert ctx.train_tokens is not None
            ctx.report.note(f"stage B: {self.heads} heads learn the {len(ctx.train_tokens):,} rows of the task")
            self._training(self.task_epochs).run(self.future, ctx.train_tokens, bundle, ctx, folder / "task")
        elif self.trained_heads is None and self.general_data is None:
            ctx.report.warn("the heads of caft_mtp are not trained: they are copies of a layer")
        if ctx.team.rank == 0:
            self._save(folder)

    def _general_stage(self, path: str, bundle: Bundle, ctx: Context, folder: Path) -> None:
        """Stage A; heads of an earlier run with the same model, rows and settings are taken from the cache."""
        table = self._general_rows(path, bundle, ctx)
        training = self._training(self.general_epochs)
        key, kept = training.key(table, bundle, self.heads, ctx), folder / "general"
        there = stagecache.fetch(key, kept) if ctx.team.rank == 0 else False
        if ctx.team.gather_object(there)[0]:
            ctx.report.note("stage A: heads trained before on these rows are reused")
            self._load(kept / FILE)
            return
        ctx.report.note(f"stage A: {self.heads} heads learn {len(table):,} rows of {path}")
        training.run(self.future, table, bundle, ctx, kept)
        if ctx.team.rank == 0:
            stagecache.keep(key, [self._save(kept)])

    def _general_rows(self, path: str, bundle: Bundle, ctx: Context) -> TokenTable:
        data = replace(ctx.settings.data, path=path, format="auto", columns={}, weights=None, limit=None)
        pool = load_pool(data, cache_dir() / "data" / "general", ctx.seed)
        if pool.kind != "sft":
            raise DataError(
                f"the heads learn from prompts and responses; {path} holds {pool.kind} rows",
                f"objective.general_data={path}",
            )
        scoring = Scoring(lambda: bundle, ctx.team, ctx.report)
        return prepared_rows(pool, replace(ctx, scoring=scoring)).table

    def _training(self, epochs: float) -> HeadTraining:
        return HeadTraining(epochs, self.heads_learning_rate, self.heads_batch_size, self.heads_max_steps, self.decay)

    def _save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self.future.state_dict().items()}, folder / FILE)
        return folder / FILE

    def _load(self, file: Path) -> None:
        if not file.is_file():
            raise ConfigError(
                f"there are no trained heads in {file.parent}",
                f"objective.trained_heads={self.trained_heads}",
                "Name the folder of a finished run of caft_mtp.",
            )
        try:
            self.future.load_state_dict(load_file(file))
        except RuntimeError as error:
            raise ConfigError(
                f"the heads in {file} are those of another model, or another number of heads",
                f"objective.trained_heads={self.trained_heads} objective.heads={self.heads}",
            ) from error
