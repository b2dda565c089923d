"""The stages of a run in order: select, attach, train, evaluate."""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ftrun import lockfile, registry, stagecache
from ftrun.adapters.base import Adapter
from ftrun.artifacts import RunLock, digest, full_disk_guard, new_run_folder, write_json, write_text
from ftrun.config.compose import Composed
from ftrun.config.settings import ModelConfig, Settings
from ftrun.context import Context, cache_dir
from ftrun.data.pool import Pool, limit_heldout, load_pool, train_and_heldout
from ftrun.data.prepare import Prepared, prepare
from ftrun.data.render import apply_template
from ftrun.data.tokens import TokenTable
from ftrun.errors import CheckpointError, ComponentError, ConfigError, DataError, FtrunError, Interrupted, Preempted
from ftrun.evaluation.run import evaluate_all, evaluating
from ftrun.models.architecture import Architecture, context_length
from ftrun.models.bundle import Bundle
from ftrun.models.load import fingerprint, load_bundle, load_config, load_tokenizer, parameters_in, resolve_dtype
from ftrun.objectives.base import Objective
from ftrun.reporting.html import write_report
from ftrun.reporting.selection import write_selection_report
from ftrun.reporting.terminal import results_table
from ftrun.select.queries import load_queries, load_rows
from ftrun.select.run import EMBEDDINGS, FILES, run_selection
from ftrun.select.shared import Shared
from ftrun.tokens.run import run_tokens
from ftrun.training import checkpoint, estimate, memory
from ftrun.training.distributed import Team
from ftrun.training.loop import Reference, Trainer, switched_off
from ftrun.training.progress import Reporter
from ftrun.training.setup import set_up
from ftrun.training.signals import StopSignals, error_for

LABELS = "labels.json"  # class names of a classification run
OUTPUTS = ("selection", "train", "eval", "adapter", "model")  # what a run computes, as against what it says of itself
SPARE, SPARE_BYTES = ".spare", 1 << 16  # given up at the end, so that a full disk has room for how the run ended
DEFAULT_LENGTH = 2048  # tokens of a row, where neither the user nor the model's context says less
# settings that may differ between a run and its continuation: they do not change what is computed
FREE_ON_RESUME = {"out", "resume", "launch", "stages", "eval", "run", "prompt"}
FREE_TRAIN_KEYS = {"save_steps", "keep_checkpoints", "log_steps", "trackers", "eval_before", "merge", "batch_tokens"}


def run(composed: Composed, verb: str, command: Sequence[str]) -> dict[str, Any]:
    """Carry out a recipe in this process (one of several, if a launcher started it) and return its summary.

    Raises FtrunError; whatever happens, summary.json says how the run ended.
    """
    settings = composed.settings
    settings.stages = ["select"] if verb == "select" else settings.stages
    return carry_out(settings, lambda ctx, signals: Chain(ctx, composed, list(command), signals))


def carry_out(settings: Settings, make: Callable[[Context, StopSignals], Chain]) -> dict[str, Any]:
    """Run a chain with all that surrounds it: seeds, run folder and its lock, processes, signals."""
    torch.manual_seed(settings.seed)
    np.random.seed(settings.seed % 2**32)  # libraries below us may draw from it
    out = run_folder(settings)
    team = Team(settings.launch, settings.train.trackers, str(out))
    report = Reporter(rank=team.rank)
    lock = RunLock(out) if team.is_main else contextlib.nullcontext()
    with lock, StopSignals() as signals, contextlib.closing(report):
        ctx = Context(settings, out, team, report)
        chain = make(ctx, signals)
        try:
            chain.check_folder()
            return chain.run()
        finally:
            team.close()


def run_folder(settings: Settings) -> Path:
    """Where this run writes. Raises ConfigError when there is no run to resume."""
    if settings.resume:
        folder = Path(settings.resume)
        if not (folder / "config.yaml").exists():
            raise ConfigError(
                f"there is no run in {folder}",
                f"resume={folder}",
                "Give the folder of a run: the one that holds config.yaml.",
            )
        return folder
    return Path(settings.out) if settings.out else new_run_folder(settings.recipe, settings.as_dict())


def holds_work(folder: Path) -> bool:
    """Whether a run has left results here; one that was refused before it computed anything leaves only its record."""
    if any((folder / name).exists() for name in OUTPUTS):
        return True
    try:
        return json.loads((folder / "summary.json").read_text())["status"] != "failed"
    except FileNotFoundError:
        return False
    except (ValueError, KeyError):
        return True


class Chain:
    """One run: what its stages share."""

    def __init__(self, ctx: Context, composed: Composed, command: list[str], signals: StopSignals):
        self.ctx, self.settings, self.report = ctx, ctx.settings, ctx.report
        self.composed, self.command, self.signals = composed, command, signals
        self.started = time.time()
        self.objective: Objective = self.settings.component("objective")
        self.trainer: Trainer | None = None
        self.selected: np.ndarray | None = None
        self.shared: Shared | None = None  # with the selections of other recipes in the same command
        self.metrics: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        self.labels: list[Any] = []  # class names, for classification
        self.work = cache_dir() / "data"

    # ---- the run and its record ----

    def run(self) -> dict[str, Any]:
        error: Exception | None = None
        try:
            with (
                memory.memory_guard(
                    "the chain was at work", "Lower train.batch_tokens and select.batch_tokens, or use a smaller model."
                ),
                full_disk_guard(self.ctx.out / "metrics and log"),
            ):
                self._open()
                self._stages()
        except Exception as problem:
            error = self._cause(problem)
        self.signals.close()
        status = (
            "done"
            if error is None
            else {130: "interrupted", 143: "preempted"}.get(getattr(error, "exit_code", 5), "failed")
        )
        try:
            summary = self._close(status, error)
        except FtrunError as problem:
            if error is None:
                raise
            self.report.warn(f"the record of this run is not complete: {problem.what}")
        if error:
            raise error
        return summary

    def _cause(self, problem: Exception) -> Exception:
        """What the user should hear of instead of its consequences."""
        if self.signals.raised and self.signals.asked and not isinstance(problem, self.signals.asked):
            problem = error_for(self.signals.asked)  # a library has put it into other words
        if isinstance(problem, (Interrupted, Preempted)):
            done = self.trainer.progress.step if self.trainer else 0
            problem.where = f"after step {done}, which is saved" if self.saved_step == done > 0 else ""
            problem.todo = f"Go on with the same command and resume={self.ctx.out}."
        elif self.ctx.team.lost_another(problem):
            problem = ComponentError("another process of this run has ended", todo="Its own message says why.")
            problem.secondary = True
        return problem

    def check_folder(self) -> None:
        """Refuse a folder that this run must not write into, before anything in it is touched."""
        out = self.ctx.out
        if self.settings.resume:
            self._check_resumed(self.identity())
        elif self.ctx.team.is_main and holds_work(out):
            raise ConfigError(
                f"{out} already holds a run", f"out={out}", f"Choose another out=DIR, or continue it with resume={out}."
            )

    def _open(self) -> None:
        out = self.ctx.out
        if self.ctx.team.is_main:
            from omegaconf import OmegaConf

            write_text(out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.resolved())))
            write_json(out / "identity.json", self.identity())
            (out / "summary.json").unlink(missing_ok=True)
            write_text(out / SPARE, " " * SPARE_BYTES)
        self.report.log_to(out / "ftrun.log")
        self.report.stage(f"ftrun {self.settings.recipe or ''}".strip(), str(out))
        for note in self.composed.notes:
            self.report.note(note)

    def resolved(self) -> dict[str, Any]:
        """What config.yaml holds."""
        return self.settings.as_dict()

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is computed; a resumed run must agree in all of them."""
        plain = {key: value for key, value in self.settings.as_dict().items() if key not in FREE_ON_RESUME}
        plain["train"] = {key: value for key, value in plain["train"].items() if key not in FREE_TRAIN_KEYS}
        return json.loads(json.dumps(plain, default=str))

    def _check_resumed(self, identity: dict[str, Any]) -> None:
        file = self.ctx.out / "identity.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        if before.get("recipe") != identity["recipe"]:
            raise CheckpointError(
                f"{self.ctx.out} is a run of recipe={before.get('recipe')}, not of {identity['recipe']}",
                f"resume={self.ctx.out}",
                "Resume with the command that started the run.",
            )
        changed = _differences(before, identity)
        if changed:
            raise CheckpointError(
                f"{self.ctx.out} was started with other settings: {'; '.join(changed[:4])}",
                f"resume={self.ctx.out}",
                "Resume with the same settings, or start a new run.",
            )

    def _close(self, status: str, error: Exception | None) -> dict[str, Any]:
        trained = self.trainer.progress if self.trainer else None
        model = self.ctx.bundle.model if self.ctx.bundle else None
        summary = {
            "recipe": self.settings.recipe,
            "status": status,
            "steps": trained.step if trained else 0,
            "tokens": trained.tokens if trained else 0,
            "wall_s": round(time.time() - self.started, 3),
            "peak_memory_bytes": memory.peak_bytes(),
            "trainable_parameters": self.counts.get("trainable", 0),
            "total_parameters": self.counts.get("total", logical_parameters(model) if model is not None else 0),
            "final_loss": trained.last_loss if trained else None,
            "metrics": self.metrics,
            "selected_rows": len(self.selected) if self.selected is not None else None,
            "out": str(self.ctx.out),
        } | self.extra_summary()
        if error is not None:
            summary["error"] = {
                "what": str(error).splitlines()[0] if str(error) else type(error).__name__,
                "message": str(error),
                "exit_code": getattr(error, "exit_code", 5),
            }
        if self.ctx.team.is_main and self.ctx.out.exists():
            (self.ctx.out / SPARE).unlink(missing_ok=True)
            files = {
                "lock.json": lockfile.describe(self.command, self.settings.seed, self.ctx.facts),
                "summary.json": summary,
            }
            # what says "done" comes last; what says how a run ended must be tried first, for the disk may be full
            for name in sorted(files, reverse=status != "done"):
                write_json(self.ctx.out / name, files[name])
            self._report(status)
        return json.loads(json.dumps(summary, default=str))

    def extra_summary(self) -> dict[str, Any]:
        """Keys that only some kinds of run add."""
        return {}

    def _report(self, status: str) -> None:
        """The page and the last table; a run is not lost because its picture cannot be drawn."""
        try:
            if (self.ctx.out / "selection").is_dir():
                write_selection_report(self.ctx.out)
            write_report(self.ctx.out)
            if status == "done":
                results_table(self.ctx.out, self.report)
        except Exception as problem:
            self.report.warn(f"the report cannot be written: {type(problem).__name__}: {problem}")

    @property
    def saved_step(self) -> int:
        """The newest step that a checkpoint holds."""
        names = [path.name for path in (self.ctx.out / "train" / "checkpoints").glob("step-*")]
        return max((int(name.removeprefix("step-")) for name in names), default=0)

    # ---- the stages ----

    def _stages(self) -> None:
        stages = self.settings.stages
        selects = self.settings.selects
        pool = self._read_pool()
        self._check_kind(pool)
        train_pool = self._split(pool) if stages != ["select"] else pool
        self.ctx.facts["data"] = pool.fingerprint
        if "select" in stages and selects:
            train_pool = self._select(train_pool)
        elif stages == ["select"] and self.settings.choice("tokens") == "none":
            raise ConfigError(
                f"recipe {self.settings.recipe} selects nothing",
                todo="Add select=superfiltering budget=0.1, or see `ftrun recipes --slot select`.",
            )
        if stages == ["select"] and self.settings.choice("tokens") == "none":
            return
        table = self._tokenise(train_pool)
        self.load_model()
        table = self._static_weights(table)
        self.ctx.train_tokens = table
        if "train" in stages:
            self._train(table)
        elif "eval" in stages:
            self._evaluate("final")

    def _read_pool(self) -> Pool:
        with self.report.task("reading", None, unit="rows") as bar:
            pool = load_pool(self.settings.data, self.work, self.settings.seed)
            bar.advance(len(pool))
        for note in pool.notes:
            self.report.note(note)
        return pool

    def _check_kind(self, pool: Pool) -> None:
        wanted = self.objective.kind
        if pool.kind != wanted and not (
            wanted == "sft" and pool.kind == "prompts" and self.settings.stages == ["eval"]
        ):
            advice = {
                "sft": "objective=sft",
                "text": "recipe=cpt (objective=text)",
                "pairs": "recipe=dpo (objective=dpo)",
                "labels": "recipe=classify_lora (task=classify)",
                "prompts": "a format with responses",
            }
            raise DataError(
                f"{self.settings.choice('objective')} trains on {wanted} rows; these are {pool.kind} rows (format {pool.format})",
                f"data.path={self.settings.data.path}",
                f"Use {advice.get(pool.kind, 'another objective')}, or name the layout with data.format and data.columns.",
            )

    def _split(self, pool: Pool) -> Pool:
        """Put the held-out rows aside; returns the rest."""
        train, heldout = train_and_heldout(pool, self.settings.data, self.work, self.settings.seed)
        for note in train.notes[len(pool.notes) :]:
            self.report.note(note)
        self.ctx.heldout = heldout if len(heldout) else None
        self.report.note(f"{len(train):,} rows to train on, {len(heldout):,} held out")
        return train

    def _select(self, pool: Pool) -> Pool:
        """Score the rows and pick; the outcome is reused when nothing that it depends on has changed."""
        settings, folder = self.settings, self.ctx.selection
        self.report.stage("select", f"{settings.choice('select')} over {len(pool):,} rows")
        model = copy.copy(settings.model)
        if settings.select.model_path:
            model = ModelConfig(path=settings.select.model_path, dtype=settings.model.dtype)
        key = digest(
            {
                "select": settings.as_dict()["select"],
                "budget": settings.budget,
                "seed": settings.seed,
                "template": settings.model.template,
                "quant": settings.slots["quant"],
                "queries": load_queries(settings).fingerprint if settings.select.queries else None,
                "files": load_rows(settings, settings.component("select").files()).fingerprint,
                "data": [settings.as_dict()["data"], pool.fingerprint, digest(pool.ids.tolist())],
                "model": [model, fingerprint(model)],
                "code": lockfile.code_digest(
                    [("select", settings.choice("select")), ("picker", settings.choice("picker"))],
                    ["select", "select/scorers", "select/pickers"],
                ),
            }
        )
        hit = stagecache.fetch("select", key, folder) if self.ctx.team.is_main else None
        if self.ctx.team.gather_object(hit)[0]:
            self.report.note("the same selection was made before: reused")
        else:
            tokenizer = load_tokenizer(model)
            if settings.task == "causal" or settings.select.model_path:
                apply_template(tokenizer, model.template)
            run_selection(settings, pool, lambda: self._scoring_bundle(model), self.ctx, tokenizer, self.shared)
            if self.ctx.team.is_main:
                files = [folder / name for name in (*FILES, EMBEDDINGS)]
                stagecache.keep("select", key, [file for file in files if file.exists()])
        self.ctx.team.barrier()
        with (folder / "selected.jsonl").open() as lines:
            self.selected = np.array([json.loads(line)["id"] for line in lines], dtype=np.int64)
        self.ctx.facts["selection"] = digest(self.selected.tolist())
        # training shuffles by itself; ids in pool order make it independent of ties in the ranking
        return pool.subset(np.sort(self.selected))

    def _scoring_bundle(self, model: ModelConfig) -> Bundle:
        """The model that scores, which is the run's own unless select.model.path names another."""
        if self.settings.select.model_path is None and self.settings.task == "causal":
            self.load_model()
            assert self.ctx.bundle is not None
            return self.ctx.bundle
        bundle = load_bundle(model, task="causal", quant=registry.build("quant", "none"), device=self.ctx.team.device)
        apply_template(bundle.tokenizer, model.template)
        return bundle

    def _tokenise(self, pool: Pool) -> TokenTable:
        prepared = self.prepare(pool, "training rows")
        self.labels = prepared.labels
        if self.labels and self.ctx.team.is_main:
            write_json(self.ctx.out / LABELS, self.labels)
        self.tokenise_heldout()
        self.ctx.facts["tokens"] = prepared.table.fingerprint()
        return prepared.table

    def tokenise_heldout(self) -> None:
        if self.ctx.heldout is not None:
            heldout = self.prepare(self.ctx.heldout, "held-out rows")
            self.ctx.heldout_tokens = heldout.table
            self.ctx.heldout = self.ctx.heldout.subset(heldout.kept)

    def prepare(self, pool: Pool, name: str) -> Prepared:
        """The pool's rows as tokens; one process makes them, the others open what it wrote."""
        tokenizer = load_tokenizer(self.settings.model)
        if self.settings.task == "causal":
            apply_template(tokenizer, self.settings.model.template)
        config = load_config(self.settings.model).get_text_config()
        limit = context_length(config)
        data = replace(self.settings.data, max_length=self.settings.data.max_length or min(limit, DEFAULT_LENGTH))
        result: Prepared | None = None
        for turn in (True, False):
            if self.ctx.team.is_main == turn:
                result = prepare(
                    pool,
                    tokenizer,
                    data,
                    context_length=limit,
                    vocab_size=config.vocab_size,
                    folder=self.work / "tokens",
                    report=self.report,
                    labels=self.labels or None,
                )
            self.ctx.team.barrier()
        assert result is not None
        for note in result.notes:
            self.report.note(f"{name}: {note}")
        return result

    def load_model(self) -> None:
        if self.ctx.bundle is not None:
            return
        settings = self.settings
        self._warn_of_large_weights()
        with (
            self.report.task("loading the model", None),
            memory.memory_guard("loading the model", "Use quant=nf4, or a smaller model."),
        ):
            labels = len(self.labels) if settings.task == "classify" else None
            bundle = load_bundle(
                settings.model,
                task=settings.task,
                quant=settings.component("quant"),
                device=self.ctx.team.device,
                labels=labels,
            )
        if settings.task == "causal":
            apply_template(bundle.tokenizer, settings.model.template)
        self.ctx.bundle = bundle
        self.counts["total"] = logical_parameters(bundle.model)
        self.ctx.facts["model"] = bundle.fingerprint
        self.ctx.facts["template"] = digest(getattr(bundle.tokenizer, "chat_template", None))

    def _warn_of_large_weights(self) -> None:
        config = load_config(self.settings.model).get_text_config()
        dtype = resolve_dtype(self.settings.model.dtype, self.ctx.team.device)
        tables = config.vocab_size * config.hidden_size * (1 if getattr(config, "tie_word_embeddings", True) else 2)
        need = estimate.weight_bytes(self.settings, parameters_in(self.settings.model), tables, dtype)
        if short := estimate.shortage(need, self._free_memory()):
            self.report.warn(f"the weights may not fit: {short}")

    def _warn_of_large_steps(self, table: TokenTable, architecture: Architecture) -> None:
        lengths = np.asarray(table.lengths).reshape(len(table), -1).sum(axis=1)
        need = estimate.training_bytes(
            self.settings,
            lengths,
            self.counts["trainable"],
            architecture.width,
            len(architecture.layers),
            self.ctx.team.device,
        )
        if short := estimate.shortage(need, self._free_memory()):
            self.report.warn(f"training may not fit: {short}")

    def _free_memory(self) -> float:
        """Bytes that this process may take: the processes of a machine without GPUs share its memory."""
        device = self.ctx.team.device
        return memory.available_bytes(device) / (self.settings.launch.processes if device.type == "cpu" else 1)

    def _static_weights(self, table: TokenTable) -> TokenTable:
        policy = self.settings.component("tokens")
        if not policy.static:
            return table
        self.report.stage("tokens", self.settings.choice("tokens"))
        return run_tokens(policy, table, self.ctx)

    # ---- train ----

    def _train(self, table: TokenTable) -> None:
        settings, bundle = self.settings, self.ctx.bundle
        assert bundle is not None
        folder = self.ctx.out / "train" / "checkpoints"
        if settings.resume and self.ctx.team.is_main:
            checkpoint.sweep(folder)
        path, damaged = checkpoint.newest_whole(folder) if settings.resume else (None, [])
        for torn in damaged:
            self.report.warn(f"{torn.name} is damaged or incomplete: passed over")
        if settings.resume and damaged and path is None:
            raise CheckpointError("no checkpoint is whole", str(folder), "Start a new run.")
        if (
            "eval" in settings.stages
            and settings.train.eval_before
            and not (self.ctx.out / "eval" / "before.json").exists()
        ):
            self._evaluate("before")
        self.report.stage(
            "train",
            f"{settings.choice('objective')} with adapter={settings.choice('adapter')}, quant={settings.choice('quant')}",
        )
        adapter: Adapter = settings.component("adapter")
        original = self._copy_for_reference(adapter, bundle.model)
        torch.manual_seed(settings.seed)
        quant = settings.component("quant")
        bundle.model = quant.prepare(bundle.model, settings.train.gradient_checkpointing)
        self.trainer = set_up(
            self.ctx,
            bundle,
            table,
            adapter=adapter,
            objective=self.objective,
            tokens=settings.component("tokens"),
            optim=settings.component("optim"),
            schedule=settings.component("schedule"),
            evaluate=self._heldout_loss
            if self.ctx.heldout_tokens is not None and len(self.ctx.heldout_tokens)
            else None,
            reference=self._reference(adapter, original),
        )
        self.counts["trainable"] = sum(p.numel() for p in self.trainer.parameters.values() if p.requires_grad)
        self._warn_of_large_steps(table, bundle.architecture)
        steps = self.trainer.plan.steps
        share = self.counts["trainable"] / max(1, self.counts["total"])
        self.report.note(
            f"{self.counts['trainable']:,} parameters train, {share:.2%} of the model's {self.counts['total']:,}; {_counted(table)}, {steps:,} step{'s' * (steps != 1)}"
        )
        if path:
            self.report.note(f"resuming from {path.name}")
        if settings.train.trackers:
            self.ctx.team.accelerator.init_trackers("ftrun", config={"recipe": settings.recipe})
        self.trainer.run(self.signals, path)
        if settings.train.load_best:
            self.trainer.load_best()
        self._save(adapter)
        if "eval" in settings.stages:
            self._evaluate("final")

    def _copy_for_reference(self, adapter: Adapter, model: nn.Module) -> nn.Module | None:
        """A frozen copy of the untrained model, where an objective needs it and the adapter cannot be switched off."""
        if not self.objective.uses_reference or type(adapter).disabled is not Adapter.disabled:
            return None
        self.report.note("the reference model is a frozen copy: this adapter cannot be switched off")
        return copy.deepcopy(model).eval().requires_grad_(False)

    def _reference(self, adapter: Adapter, original: nn.Module | None) -> Reference | None:
        if not self.objective.uses_reference:
            return None
        if original is None:
            return lambda: switched_off(adapter, self.ctx.bundle.model)  # type: ignore[union-attr]

        @contextlib.contextmanager
        def frozen() -> Iterator[nn.Module]:
            yield original

        return frozen

    def _save(self, adapter: Adapter) -> None:
        assert self.ctx.bundle is not None
        if self.ctx.team.is_main:
            folder = adapter.save(self.ctx.bundle.model, self.ctx.out)
            self.ctx.bundle.tokenizer.save_pretrained(folder)
            self.report.note(f"saved {folder}")
            if self.settings.train.merge and folder.name == "adapter":
                from ftrun.verbs.merge import merge_run

                self.report.note(f"merged into {merge_run(self.ctx.out, self.settings, self.ctx.team.device)}")
        self.ctx.team.barrier()

    # ---- evaluate ----

    def load_rows_for_evaluation(self) -> None:
        """The rows that a finished run held out, or all of ``data.path`` when it is evaluated alone."""
        file = self.ctx.out / LABELS
        self.labels = json.loads(file.read_text()) if file.exists() else []
        pool = load_pool(self.settings.data, self.work, self.settings.seed)
        if self.settings.run is not None or self.settings.data.heldout_path:
            self._split(pool)
        else:
            self.ctx.heldout = limit_heldout(pool, self.settings.data.heldout_limit, self.settings.seed)
        self.tokenise_heldout()

    def _heldout_loss(self) -> float:
        """The loss that decides which checkpoint is best."""
        assert self.ctx.bundle is not None
        name = "classification" if self.settings.task == "classify" else "heldout"
        with evaluating(self.ctx.bundle.model):
            return registry.build("eval", name).evaluate(self.ctx.bundle, self.ctx).metrics["loss"].value

    def _evaluate(self, tag: Literal["before", "final"]) -> None:
        evaluators = self.settings.evaluators()
        if not evaluators:
            return
        assert self.ctx.bundle is not None
        self.report.stage("evaluate", "before training" if tag == "before" else "")
        results = evaluate_all(evaluators, self.ctx.bundle, self.ctx, tag)
        target = self.metrics.setdefault("before", {}) if tag == "before" else self.metrics
        for evaluator, metrics in results.items():
            target[evaluator] = {name: entry["value"] for name, entry in metrics.items()}


def logical_parameters(model: nn.Module) -> int:
    """Parameters as the architecture counts them: two 4-bit weights share a byte in storage."""
    total = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None) if packed else None
        total += int(np.prod(shape)) if shape is not None else parameter.numel()
    return total


def _counted(table: TokenTable) -> str:
    """``40 rows``, or ``12 rows in 40 pieces`` where long texts were split: the pieces are what a step draws."""
    pieces = int(table.continues.sum())
    return f"{len(table) - pieces:,} rows" + (f" in {len(table):,} pieces" if pieces else "")


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    """``train.batch_size 8 -> 4`` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for name in sorted(before.keys() | now.keys()):
            found += _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        return found
    return [] if before == now else [f"{key} {before} -> {now}"]
