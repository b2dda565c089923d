"""Short trainings while a selection runs, for methods that look at a model as it learns.

The model that scores is trained in place and put back afterwards, to the bit. Every finished epoch lies below the
selection's shards, so that a selection that was killed goes on after the last one.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ftrun import registry
from ftrun.adapters.peft_adapter import is_quantised, seeded
from ftrun.config.settings import TrainConfig
from ftrun.data.prepare import Prepared, prepare
from ftrun.data.tokens import TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.models.precision import products_of, set_products
from ftrun.runs.artifacts import cache_dir, digest, is_whole
from ftrun.runs.stagecache import key_of
from ftrun.training.context import Context
from ftrun.training.loop import Trainer
from ftrun.training.scoring import segments
from ftrun.training.setup import set_up
from ftrun.training.signals import StopSignals

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.models.bundle import Bundle
    from ftrun.select.scoring.texts import Turns
    from ftrun.training.parts import Minimised
    from ftrun.training.scoring import Scoring

DEFAULT_LENGTH = 2048  # tokens of a row, where neither the user nor the model's context says less


@dataclass
class Checkpoint:
    """What an epoch of training left behind, on the CPU; the three dicts have the same names, those of the model."""

    weights: dict[str, Tensor]  # everything that trained
    exp_avg: dict[str, Tensor]  # Adam's first moment
    exp_avg_sq: dict[str, Tensor]  # Adam's second moment
    learning_rate: float  # mean over the steps of the epoch


@dataclass
class Epoch:
    """The model at the end of an epoch. It holds until the next epoch is asked for."""

    number: int  # from 1
    bundle: Bundle  # with a fingerprint of its own
    trainer: Trainer = field(repr=False)
    learning_rate: float  # mean over the steps of the epoch

    def scoring(self, ctx: Context) -> Scoring:
        """The engine that scores texts with the model of this epoch."""
        return ctx.scorer.with_model(lambda: self.bundle)

    def checkpoint(self) -> Checkpoint:
        """Copies of the weights and of Adam's moments."""
        parameters, state = self.trainer.parameters, self.trainer.optimizer.state
        return Checkpoint(
            {name: _copied(p) for name, p in parameters.items()},
            {name: _moment(state[p], "exp_avg", p) for name, p in parameters.items()},
            {name: _moment(state[p], "exp_avg_sq", p) for name, p in parameters.items()},
            self.learning_rate,
        )


@dataclass
class InnerTraining:
    """A supervised fine-tuning with AdamW, of LoRA adapters or of all weights."""

    trains: Literal["lora", "full"] = "lora"
    epochs: int = 1
    learning_rate: float = 2e-4  # peak
    batch_size: int = 16  # rows per optimiser step, over all processes
    schedule: str = "cosine"
    warmup: float = 0.03  # share of the steps, or their number
    max_steps: int | None = None  # stop after this many
    lora: dict[str, Any] = field(default_factory=dict)  # knobs of adapter=lora: r, lora_alpha, target_modules ...
    called: str = "select."  # what stands before the names of these knobs on the command line, for errors

    def __post_init__(self) -> None:
        for knob in ("epochs", "learning_rate", "batch_size"):
            if getattr(self, knob) <= 0:
                raise ConfigError(
                    f"training for the selection needs a positive {knob}", f"{self.called}{knob}={getattr(self, knob)}"
                )

    def run(self, table: TokenTable, ctx: Context, title: str = "training for the selection") -> Generator[Epoch]:
        """Train the model of ``ctx.scorer`` on ``table``, and yield it after every epoch.

        The rows are shuffled by content, so the result does not depend on their order. To leave early, close the
        generator: the model is put back when it ends. Raises ConfigError for a model that cannot train like this.
        """
        base = ctx.scorer.bundle
        if self.trains == "full" and is_quantised(base.model):
            raise ConfigError(
                f"training for the selection would change all weights of {base.path}, which are quantised",
                f"{self.called}trains=full",
                f"Use {self.called}trains=lora, or score with another model: select.model.path=...",
            )
        if not len(table):
            raise DataError("there are no rows to train on for the selection", "data.path")
        table = table.rows(by_content(table))
        key = self._key(table, base, ctx.seed)
        shards = ctx.scorer.shards or ctx.selection / "shards"
        inner = self._context(ctx, table, shards / f"training-{key}")
        with _put_back(base.model, base.architecture.backbone, keep_weights=self.trains == "full"), _taken_off(inner):
            with seeded(ctx.seed):
                trainer = self._trainer(inner, table, title)
            start = 0
            for number, end in enumerate(self._ends(trainer), 1):
                self._reach(trainer, end)
                rate = self._mean_rate(trainer, start, end)
                fingerprint = digest([base.fingerprint, key, number])
                yield Epoch(number, replace(trainer.bundle, fingerprint=fingerprint), trainer, rate)
                start = end

    @contextlib.contextmanager
    def trained(self, table: TokenTable, ctx: Context, title: str = "training for the selection") -> Iterator[Epoch]:
        """The model at the end of ``run``, for as long as the context lasts."""
        with contextlib.closing(self.run(table, ctx, title)) as epochs:
            for epoch in epochs:
                if epoch.trainer.progress.step == epoch.trainer.plan.steps:
                    yield epoch

    def objective(self) -> Minimised:
        """What the model learns of the table."""
        return registry.build("objective", "sft")

    # ---- parts ----

    def _key(self, table: TokenTable, base: Bundle, seed: int) -> str:
        """Names the checkpoints in the run folder that a training which was killed goes on from."""
        what = {"training": asdict(self), "table": table.fingerprint(), "model": base.computes, "seed": seed}
        chosen = {"quant": [], "select": [], "picker": [], "tokens": []}  # the run folder is one of one config
        return key_of("training", what, modules=[__name__, type(self).__module__], chosen=chosen).digest

    def _context(self, ctx: Context, table: TokenTable, out: Path) -> Context:
        """A context as training expects it: its own folder, and settings that say what is trained here."""
        train = TrainConfig(
            max_steps=self.max_steps,
            epochs=self.epochs,
            batch_size=min(self.batch_size, len(table)),  # an epoch is a step at least
            batch_tokens=ctx.settings.train.batch_tokens,
            packing=ctx.settings.train.packing,
            gradient_checkpointing=ctx.settings.train.gradient_checkpointing,
            keep_checkpoints=self.epochs,
        )
        settings = replace(ctx.settings, train=train, task="causal")
        return replace(ctx, settings=settings, out=out, bundle=replace(ctx.scorer.bundle), train_tokens=table, begin=[])

    def _trainer(self, ctx: Context, table: TokenTable, title: str) -> Trainer:
        assert ctx.bundle is not None
        return set_up(
            ctx,
            ctx.bundle,
            table,
            adapter=registry.build("adapter", "lora", self.lora)
            if self.trains == "lora"
            else registry.build("adapter", "none"),
            objective=self.objective(),
            tokens=registry.build("tokens", "none"),
            optim=registry.build("optim", "adamw", {"learning_rate": self.learning_rate}),
            schedule=registry.build("schedule", self.schedule, self._schedule_knobs()),
            title=title,
        )

    def _schedule_knobs(self) -> dict[str, Any]:
        return {"warmup": self.warmup} if "warmup" in registry.find("schedule", self.schedule).knobs else {}

    def _ends(self, trainer: Trainer) -> list[int]:
        """Last step of every epoch; a step across a seam counts to the epoch before it."""
        plan = trainer.plan
        ends = [-(-plan.rows * epoch // plan.batch_size) for epoch in range(1, self.epochs + 1)]
        return list(dict.fromkeys(min(end, plan.steps) for end in ends))

    def _reach(self, trainer: Trainer, end: int) -> None:
        """Have the trainer at step ``end``: from the disk where it was there before, else by training."""
        path = trainer.folder / "checkpoints" / f"step-{end:06d}"
        there = is_whole(path) if trainer.team.rank == 0 else False
        if trainer.team.gather_object(there)[0]:
            trainer.restore(path)
        else:
            with seeded(trainer.ctx.seed):  # training seeds the global generators
                trainer.run(StopSignals(), until=end)
        trainer.bundle.model.eval()

    def _mean_rate(self, trainer: Trainer, start: int, end: int) -> float:
        factors = [trainer.schedule.factor(step, trainer.plan.steps) for step in range(start, end)]
        return self.learning_rate * float(np.mean(factors))


def prepared_rows(pool: Pool, ctx: Context, kinds: tuple[str, ...] = ("sft",)) -> Prepared:
    """The rows as training would see them, by the tokenizer of the model that scores. Raises DataError, ConfigError."""
    if pool.kind not in kinds:
        raise DataError(
            f"this selection trains on {'answers or texts' if 'text' in kinds else 'answers'}; "
            f"these are {pool.kind} rows (format {pool.format})",
            f"data.path={ctx.settings.data.path}",
            "Use rows with prompts and responses, or another selector.",
        )
    bundle = ctx.scorer.bundle
    length = ctx.settings.data.max_length or min(bundle.context_length, DEFAULT_LENGTH)
    result: Prepared | None = None
    for turn in (True, False):  # one process writes, the others open what it wrote
        if (ctx.team.rank == 0) == turn:
            result = prepare(
                pool,
                bundle.tokenizer,
                replace(ctx.settings.data, max_length=min(length, bundle.context_length)),
                context_length=bundle.context_length,
                vocab_size=bundle.architecture.vocabulary,
                folder=cache_dir() / "data" / "tokens",
                report=ctx.report,
            )
        ctx.team.barrier()
    assert result is not None
    for note in result.notes:
        ctx.report.note(f"rows to train on for the selection: {note}")
    return result


def answers_table(turns: Turns, pool: Pool, max_length: int, ctx: Context) -> TokenTable:
    """One sequence a turn: the prompt as context, the response and the end-of-text token as targets, cut at ``max_length``.

    A turn whose prompt leaves no room has no target; ``ctx.scorer.reasons`` says which rows have nothing but such turns.
    """
    end = ctx.scorer.tokenizer.eos_token_id
    tail = [] if end is None else [end]
    whole = [[*response, *tail] for response in turns.response]
    rooms = [max(0, max_length - len(prompt)) for prompt in turns.prompt]
    table = segments((prompt, target[:room]) for prompt, target, room in zip(turns.prompt, whole, rooms, strict=True))
    heard = set(turns.row[table.trained_counts() > 0].tolist())
    spoken = set(turns.row.tolist())
    for row in range(len(pool)):
        if row not in heard:
            full = f"the prompt fills max_length={max_length}"
            ctx.scorer.reasons[row] = full if row in spoken else "no response"
    cut = sum(0 < room < len(target) for target, room in zip(whole, rooms, strict=True))
    if cut:
        ctx.report.note(f"{cut} of {len(rooms)} responses are read up to max_length={max_length} only")
    return replace(table, record=pool.ids[turns.row])


def trainable(table: TokenTable) -> TokenTable:
    """The sequences that have a target."""
    return table.rows(np.flatnonzero(table.trained_counts() > 0))


def by_content(table: TokenTable, salt: str = "") -> np.ndarray:
    """Positions of the rows sorted by a hash of what they say, (rows,); each ``salt`` gives another order."""
    hashes = []
    for index in range(len(table)):
        sequence = table.sequence(index)
        content = np.ascontiguousarray(sequence.input_ids, np.int32).tobytes()
        content += np.ascontiguousarray(sequence.loss_weight, np.float32).tobytes()
        hashes.append(hashlib.blake2b(content, digest_size=16, key=salt.encode()).digest())
    return np.array(sorted(range(len(hashes)), key=hashes.__getitem__), np.int64)


@contextlib.contextmanager
def _put_back(model: nn.Module, backbone: str, keep_weights: bool) -> Iterator[None]:
    """The model afterwards as before: what trains, its mode, and with ``keep_weights`` the weights themselves."""
    parameters = dict(model.named_parameters())
    trainable = {name: p.requires_grad for name, p in parameters.items()}
    # on the CPU: a second copy on the device may not fit beside the optimiser
    weights = {name: _copied(p) for name, p in parameters.items()} if keep_weights else {}
    training, narrow, dtypes = model.training, products_of(model), {name: p.dtype for name, p in parameters.items()}
    try:
        yield
    finally:
        set_products(model, backbone, narrow)
        for name, parameter in parameters.items():
            parameter.data = parameter.data.to(dtypes[name])  # widened to train
        with torch.no_grad():
            for name, saved in weights.items():
                parameters[name].copy_(saved)
        for name, parameter in parameters.items():
            parameter.requires_grad_(trainable[name])
            parameter.grad = None
        model.train(training)


@contextlib.contextmanager
def _taken_off(ctx: Context) -> Iterator[None]:
    """Without the adapter again afterwards, whether or not the training was ever set up."""
    try:
        yield
    finally:
        assert ctx.bundle is not None
        model: Any = ctx.bundle.model
        if hasattr(model, "unload"):
            model = model.unload()
        if ctx.settings.train.gradient_checkpointing:
            model.gradient_checkpointing_disable()


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _moment(state: dict[str, Tensor], name: str, parameter: Tensor) -> Tensor:
    """A moment of Adam; zeros for a parameter that no loss has reached."""
    return _copied(state[name]) if name in state else torch.zeros_like(parameter, device="cpu")
