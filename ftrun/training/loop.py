"""The training loop.

One optimiser step: the rows of the step are dealt to the processes, each cuts its share into micro-batches, the loss of
every micro-batch is divided by what the whole step counts on all processes, gradients are added up, clipped and applied.
So the result depends neither on the number of processes nor on how a step is cut.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftrun.data.batches import Batch, Plan, micro_batches, token_budget
from ftrun.data.tokens import TokenTable
from ftrun.errors import ComponentError, DataError, Interrupted, Preempted
from ftrun.models.bundle import Bundle
from ftrun.models.fast import packs_for_free
from ftrun.runs import memory
from ftrun.runs.artifacts import strict
from ftrun.schedules.base import Schedule
from ftrun.training import checkpoint, weightlog
from ftrun.training.checkpoint import Progress
from ftrun.training.context import Context
from ftrun.training.parts import Attached, Minimised, Weighing
from ftrun.training.signals import StopSignals
from ftrun.training.strategies.base import Strategy
from ftrun.training.view import StepView
from ftrun.training.weightlog import WeightLog

Reference = Callable[[], AbstractContextManager[nn.Module]]


@dataclass
class Trainer:
    """One run of the loop. ``reference`` yields the untrained model, for objectives that compare with it."""

    ctx: Context
    bundle: Bundle
    table: TokenTable
    adapter: Attached
    objective: Minimised
    tokens: Weighing
    optimizer: Optimizer
    schedule: Schedule
    parameters: dict[str, nn.Parameter]  # everything that may train, by name
    strategy: Strategy  # how the processes share a step
    evaluate: Callable[[], float] | None  # held-out loss
    reference: Reference | None = None
    title: str = "training"  # of the progress display
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.settings = self.ctx.settings.train
        self.team = self.ctx.team
        self.plan = self.planned(self.settings.epochs, self.settings.max_steps)
        self.folder = self.ctx.out / "train"
        apart = not (self.objective.packs and self.tokens.packs)
        joins = not apart and packs_for_free(self.bundle.model, self.bundle.architecture)
        self.batch_tokens = token_budget(self.settings.batch_tokens, self.team.device)
        self.packing = joins if self.settings.packing is None else self.settings.packing
        self.progress.data = self.table.fingerprint()
        if self.tokens.dynamic:
            self.weight_log = WeightLog(self.bundle.tokenizer, self.bundle.architecture.vocabulary, self.table.record)
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        if not self.table.trained_counts().any() and self.objective.kind != "labels":
            raise DataError(
                "there is nothing to train on: no token of any row carries loss",
                todo="Look at the rows with `ftrun preview`.",
            )
        if self.settings.batch_size < self.team.world_size:
            raise DataError(
                f"{self.team.world_size} processes cannot share a step of {self.settings.batch_size} rows",
                todo="Raise train.batch_size.",
            )

    def planned(self, epochs: float, max_steps: int | None) -> Plan:
        """The rows of every step of a run of this length."""
        order = self.tokens.order(self.table)
        return Plan.of(
            len(self.table), self.settings.batch_size, epochs, max_steps, self.ctx.seed, order, self.ctx.begin
        )

    # ---- the whole run ----

    def run(self, signals: StopSignals, resume: Path | None = None, until: int | None = None) -> Progress:
        """Train to the last step, or to step ``until`` and save there, saving and evaluating on the way.

        Raises Interrupted or Preempted after saving when somebody asked to stop, ComponentError when the loss is no number.
        """
        if resume:
            self.restore(resume)
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = self.plan.steps
        if not any(rate * self.schedule.factor(step, steps) for rate in self.peak_rates for step in range(steps)):
            self.ctx.report.warn(f"the learning rate is 0 in all {steps} steps: nothing is learned")
        end = self.plan.steps if until is None else until
        with (
            self._log_file("metrics.jsonl") as metrics,
            self._log_file(weightlog.FILE if self.tokens.dynamic else None) as weights,
            self.ctx.report.task(self.title, end, unit="steps", start=self.progress.step) as bar,
        ):
            self._bar = bar
            signals.defer(True)
            while self.progress.step < end:
                facts = self._step(self.progress.step)
                self._log(facts, metrics, bar)
                self._log_weights(weights)
                stop = self._anyone_asked_to_stop(signals)
                self._save_and_evaluate(metrics, force=stop or self.progress.step == end)
                if stop:
                    break
            signals.defer(False)
        if self.progress.trained_tokens == 0 and self.objective.kind != "labels":
            raise DataError(
                "the run trained on nothing: every step's tokens had weight 0",
                todo="Look at the token weights with `ftrun preview`.",
            )
        return self.progress

    def _step(self, step: int) -> dict[str, float]:
        started = time.perf_counter()
        self.tokens.before_step(step, self)
        torch.manual_seed(int(np.random.SeedSequence([self.ctx.seed, step, self.team.rank]).generate_state(1)[0]))
        self.adapter.before_step(step)
        self.strategy.before_step()
        self.bundle.model.train()
        batches = self._my_batches(step)
        counts = self._counts(batches)
        count, tokens, trained = counts["loss"], counts.pop("tokens"), counts.pop("trained_tokens")
        with memory.memory_guard(f"training step {step + 1}", self._advice()):
            sums = self._backward(batches, max(count, 1.0), counts)
        names = sorted(sums)
        totals = self.team.sum(
            torch.tensor([sums[name] for name in names], dtype=torch.float64, device=self.team.device)
        ).tolist()
        facts = {name: value / max(count, 1.0) for name, value in zip(names, totals, strict=True)}
        norm = self._clip()
        if not (math.isfinite(facts["loss"]) and math.isfinite(norm)):
            self._not_a_number(step, facts["loss"], norm)
        rate = self._set_rates(step)
        with memory.memory_guard(
            f"updating the weights in step {step + 1}",
            "Train fewer parameters with adapter=lora, or use optim=adamw_8bit.",
        ):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.adapter.after_step(step)
        self.progress.step = step + 1
        self.progress.tokens += int(tokens)
        self.progress.trained_tokens += int(trained)
        self.progress.last_loss = facts["loss"]
        seconds = time.perf_counter() - started
        head = {
            "step": step + 1,
            "tokens": self.progress.tokens,
            "loss": facts.pop("loss"),
            "lr": rate,
            "grad_norm": norm,
        }
        return head | {"tokens_per_s": tokens / seconds, "memory_bytes": memory.current_bytes(), **facts}

    def _counts(self, batches: list[Batch]) -> dict[str, float]:
        """What the losses are divided by, and the tokens, of the whole step on all processes."""
        mine: dict[str, float] = {}
        for batch in batches:
            own = {"loss": self.objective.count(batch), "tokens": batch.tokens, "trained_tokens": batch.trained_tokens}
            for name, value in (own | self.objective.counts(batch)).items():
                mine[name] = mine.get(name, 0.0) + value
        total = {"loss": 0.0, "tokens": 0.0, "trained_tokens": 0.0}
        for part in self.team.gather_object(mine):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def _backward(self, batches: list[Batch], count: float, counts: dict[str, float]) -> dict[str, float]:
        """Forward and backward of all micro-batches; sums of the loss and its parts on this process."""
        rounds = self.strategy.rounds(len(batches))
        # a process with fewer of its own goes along with the first row of the step, which counts nothing there
        spare = self._micro_batches(self.plan.step(self.progress.step)[:1])[:1] if rounds > len(batches) else []
        views = self._views([*batches, *spare * (rounds - len(batches))], counts)
        statistics = None
        if self.tokens.whole_step and len(views) > 1:
            statistics = self._statistics(self._views([view.batch for view in views], counts), len(batches))
        sums: dict[str, float] = {"loss": 0.0}
        if self.tokens.dynamic:
            self.weight_log.clear()
        for number in range(rounds):
            view = views.pop(0)  # its graph is freed with it
            work = functools.partial(self._loss, view, count, statistics, sums, number < len(batches))
            self.strategy.backward(work, last=number == rounds - 1)
            self._bar.advance(0)  # a long step still shows that it lives
        return sums

    def _loss(
        self, view: StepView, count: float, statistics: Tensor | None, sums: dict[str, float], counts: bool
    ) -> Tensor:
        """The loss of one micro-batch, divided by ``count``; it and its parts are added to ``sums`` if it ``counts``."""
        if self.tokens.whole_step and statistics is None:
            statistics = self._gathered_statistics([self.tokens.statistic(view).detach()] if counts else [])
        if self.tokens.dynamic:
            view.step_statistics = statistics
            _ = view.token_nll  # made with its graph, before gradients are switched off
            with torch.no_grad():
                view.factors = self.tokens.weigh(view)
            if counts:
                self.weight_log.add(view.batch, view.factors.float().cpu().numpy())
        loss = self.objective.loss(view)
        if not counts:
            return 0.0 * loss.value
        for name, part in {"loss": loss.value, **loss.parts, **view.parts}.items():
            sums[name] = sums.get(name, 0.0) + float(part.detach())
        return loss.value / count

    def _views(self, batches: list[Batch], counts: dict[str, float]) -> list[StepView]:
        seed = (self.ctx.seed, self.progress.step)
        perturb = functools.partial(self.tokens.perturb, seed=seed) if self.tokens.perturbs else None
        return [
            StepView(
                self.bundle.model,
                self.bundle.architecture,
                batch,
                self.reference,
                perturb=perturb,
                counts=counts,
                step=self.progress.step,
                steps=self.plan.steps,
                watched_layer=self.tokens.watched_layer(),
            )
            for batch in batches
        ]

    def _statistics(self, views: list[StepView], mine: int) -> Tensor:
        """What the token policy wants to know of the whole step, from the first ``mine`` micro-batches of every process.

        A step of one micro-batch needs no pass of its own for it: there the graph is kept for the loss.
        """
        with torch.no_grad():
            parts = [self.strategy.forward(functools.partial(self.tokens.statistic, view)) for view in views]
        return self._gathered_statistics(parts[:mine])

    def _gathered_statistics(self, parts: list[Tensor]) -> Tensor:
        mine = torch.cat(parts).cpu() if parts else torch.zeros(0)
        return torch.cat(self.team.gather_object(mine)).to(self.team.device)

    def weights_at_start(self) -> dict[int, Tensor]:
        """Loss weights of the trained tokens in the first step, by sequence of the table: (tokens,) each, in their order.

        Only of the rows of this process. Sequences whose batch was arranged anew count the tokens that it has.
        """
        batches = self._my_batches(0)
        views = self._views(batches, self._counts(batches))
        found: dict[int, Tensor] = {}
        with torch.no_grad():
            statistics = self._statistics(views, len(views)) if self.tokens.whole_step else None
            for view in views:
                view.step_statistics = statistics
                if self.tokens.dynamic:
                    view.factors = self.tokens.weigh(view)
                for number, index in enumerate(view.batch.table_index.tolist()):
                    found[index] = view.weights[view.batch.target_sequence == number]
        return found

    # ---- pieces of a step ----

    def _my_batches(self, step: int) -> list[Batch]:
        lengths = self._input_lengths
        per_row = lengths.reshape(len(self.table), -1).sum(axis=1)
        rows = deal(self.plan.step(step), per_row, self.team.world_size)[self.team.rank]
        return self._micro_batches(rows) if len(rows) else []

    def _micro_batches(self, rows: np.ndarray) -> list[Batch]:
        cut = micro_batches(self.table, rows, self.batch_tokens, self.packing, self.bundle.pad_id, self._input_lengths)
        batches = [batch.to(self.team.device) for batch in cut]
        if not self.tokens.arranges:
            return batches
        step = self.progress.step
        return [self.tokens.arrange(batch, (self.ctx.seed, step), step / self.plan.steps) for batch in batches]

    @functools.cached_property
    def _input_lengths(self) -> np.ndarray:
        """Inputs of every sequence, (sequences,)."""
        return np.asarray(self.tokens.input_lengths(self.table))

    def _clip(self) -> float:
        return self.strategy.clip(list(self.parameters.values()), self.settings.max_grad_norm)

    def _set_rates(self, step: int) -> float:
        factor = self.schedule.factor(step, self.plan.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        return self.peak_rates[0] * factor

    def _not_a_number(self, step: int, loss: float, norm: float) -> None:
        drawn = self.table.record[self.plan.step(step) * self.table.sequences_per_row]
        rows = list(dict.fromkeys(drawn.tolist()))
        raise ComponentError(
            f"the {'loss' if not math.isfinite(loss) else 'gradient norm'} is not a number at step {step + 1} (loss {loss:g}, gradient norm {norm:g})",
            f"rows {', '.join(map(str, rows[:16]))}{' ...' if len(rows) > 16 else ''}",
            "Lower optim.learning_rate, raise schedule.warmup, or look at these rows with `ftrun preview`. The last checkpoint is untouched.",
        )

    def _advice(self) -> str:
        half = max(1, self.batch_tokens // 2)
        return f"Try train.batch_tokens={half}, train.gradient_checkpointing=true, a shorter data.max_length, or quant=nf4 with an adapter."

    # ---- around the steps ----

    def _anyone_asked_to_stop(self, signals: StopSignals) -> bool:
        """Also tells a process that was not asked what the others were asked for."""
        kinds = (Interrupted, Preempted)
        asked = torch.tensor([float(signals.asked is kind) for kind in kinds], device=self.team.device)
        found = [kind for kind, count in zip(kinds, self.team.sum(asked).tolist(), strict=True) if count > 0]
        if found and signals.asked is None:
            signals.asked = found[0]
        return bool(found)

    def _save_and_evaluate(self, metrics: TextIO | None, force: bool) -> None:
        step, last = self.progress.step, self.progress.step == self.plan.steps
        if self.evaluate and self.settings.eval_steps and (step % self.settings.eval_steps == 0 or last):
            self.strategy.open()
            loss = self.evaluate()
            if self.progress.best_loss is None or loss < self.progress.best_loss:
                self.progress.best_loss, self.progress.best_step = loss, step
            self._write({"step": step, "eval_loss": loss}, metrics)
        if force or last or (self.settings.save_steps and step % self.settings.save_steps == 0):
            if self.team.is_main or self.strategy.sharded:
                checkpoint.save(
                    self.folder / "checkpoints", self.progress, self.parameters, self.optimizer, self.adapter, self.team
                )
            if self.team.is_main:
                spare = self.progress.best_step if self.settings.load_best else None
                checkpoint.prune(self.folder / "checkpoints", self.settings.keep_checkpoints, spare)
            self.team.barrier()

    def load_best(self) -> None:
        """Put the weights of the lowest held-out loss back."""
        step = self.progress.best_step
        if step and step != self.progress.step:
            path = self.folder / "checkpoints" / f"step-{step:06d}"
            checkpoint.load(path, self.parameters, self.optimizer, self.adapter)
            self.ctx.report.note(f"best held-out loss was at step {step}: its weights are kept")

    def restore(self, path: Path) -> None:
        """Put weights, optimiser and progress of a checkpoint in place. Raises CheckpointError, DataError when it does not fit."""
        data = self.progress.data
        self.progress = checkpoint.load(path, self.parameters, self.optimizer, self.adapter)
        if self.progress.data != data:
            raise DataError(
                "the data is not what the run was started with",
                str(path),
                "Resume with the same rows, tokenizer and template, or start a new run.",
            )

    def _log_file(self, name: str | None) -> AbstractContextManager[TextIO | None]:
        """A file of lines, cut back to the step that a resumed run starts from."""
        if not self.team.is_main or name is None:
            return contextlib.nullcontext()
        path = self.folder / name
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= self.progress.step]
        path.write_text("".join(line + "\n" for line in kept))
        return path.open("a")

    def _log(self, facts: dict[str, float], metrics: TextIO | None, bar: Any) -> None:
        bar.advance(1, loss=facts["loss"], tokens_per_s=facts["tokens_per_s"], memory_bytes=facts["memory_bytes"])
        if self.progress.step % self.settings.log_steps == 0 or self.progress.step == self.plan.steps:
            self._write(facts, metrics)

    def _log_weights(self, file: TextIO | None) -> None:
        """What the token policy made of the tokens of the step; every process takes part."""
        if not self.tokens.dynamic or self.progress.step % self.settings.log_steps:
            return
        gathered = self.team.gather_object(self.weight_log.gathered)
        if file:
            file.write(json.dumps(strict(self.weight_log.line(self.progress.step, gathered))) + "\n")
            file.flush()

    def _write(self, facts: dict[str, float], metrics: TextIO | None) -> None:
        if metrics:
            metrics.write(json.dumps(strict(facts)) + "\n")
            metrics.flush()
        if self.settings.trackers:
            self.team.accelerator.log(
                {key: value for key, value in facts.items() if key != "step"}, step=int(facts["step"])
            )


def deal(rows: np.ndarray, lengths: np.ndarray, processes: int) -> list[np.ndarray]:
    """Rows of a step shared out so that every process gets about as many tokens: longest first, always to the lightest.

    Ties go to the lower process, so all processes agree without talking.
    """
    if processes == 1:
        return [rows]
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads: list[tuple[int, int]] = [(0, rank) for rank in range(processes)]
    for row in rows[np.argsort(-lengths[rows], kind="stable")]:
        load, rank = min(loads)
        shares[rank].append(int(row))
        loads[loads.index((load, rank))] = (load + int(lengths[row]), rank)
    return [np.array(share, dtype=np.int64) for share in shares]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # a line that a kill cut short


@contextlib.contextmanager
def switched_off(adapter: Attached, model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before training, by switching the adapter off; dropout is off too."""
    context = adapter.disabled(model)
    assert context is not None
    training = model.training
    model.eval()
    with context:
        yield model
    model.train(training)
