"""The stages of a run in order: select, attach, train, evaluate."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ftrun import registry
from ftrun.runs import lockfile
from ftrun.runs import stagecache
from ftrun.adapters.base import Adapter
from ftrun.runs.artifacts import digest, write_json
from ftrun.config.compose import Composed
from ftrun.config.settings import ModelConfig
from ftrun.runs.context import Context, cache_dir
from ftrun.data.pool import Pool, limit_heldout, load_pool, train_and_heldout
from ftrun.data.prepare import Prepared, prepare
from ftrun.data.render import apply_template
from ftrun.data.roles import with_roles
from ftrun.data.tokens import TokenTable
from ftrun.errors import CheckpointError, ConfigError, DataError
from ftrun.evaluation.base import nothing_held_out
from ftrun.evaluation.run import evaluate_all, evaluating
from ftrun.models.architecture import Architecture, context_length
from ftrun.models.bundle import Bundle
from ftrun.models.load import fingerprint, load_bundle, load_config, load_tokenizer, parameters_in, resolve_dtype
from ftrun.objectives.base import Objective
from ftrun.runs.recorded import RecordedRun, carry_out, logical_parameters
from ftrun.select.order import picker_of, training_order
from ftrun.select.queries import load_queries, load_rows
from ftrun.select.run import FILES, SOMETIMES, run_selection
from ftrun.select.scoring.shared import Shared
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.run import edit_rows, run_tokens
from ftrun.training import checkpoint, estimate, memory
from ftrun.training.loop import Reference, Trainer, switched_off
from ftrun.training.setup import set_up
from ftrun.training.signals import StopSignals

LABELS = "labels.json"  # class names of a classification run
EVALUATED = "edited_evaluated"  # rows that `ftrun eval` asks, as the token policy edits them
DEFAULT_LENGTH = 2048  # tokens of a row, where neither the user nor the model's context says less


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
        self.shared: Shared | None = None  # with the selections of other recipes in the same command
        self.labels: list[Any] = []  # class names, for classification
        self.work = cache_dir() / "data"

    def stages(self) -> None:
        stages = self.settings.stages
        selects = self.settings.selects
        pool = self.read_pool()
        self.check_kind(pool)
        train_pool = self._split(pool) if stages != ["select"] else pool
        self.ctx.facts["data"] = pool.fingerprint
        if "select" in stages and selects:
            train_pool = self.select(train_pool)
        elif stages == ["select"] and self.settings.choice("tokens") == "none":
            raise ConfigError(
                f"recipe {self.settings.recipe} selects nothing",
                todo="Add select=superfiltering budget=0.1, or see `ftrun recipes --slot select`.",
            )
        if stages == ["select"] and self.settings.choice("tokens") == "none":
            return
        train_pool = self.edit(train_pool)
        table = self._tokenise(train_pool)
        self.load_model()
        table = self.weigh(table, train_pool)
        self.ctx.train_tokens = table
        if "train" in stages:
            self._train(table)
        elif "eval" in stages:
            self._evaluate("final")

    def read_pool(self) -> Pool:
        with self.report.task("reading", None, unit="rows") as bar:
            pool = load_pool(self.settings.data, self.work, self.settings.seed)
            bar.advance(len(pool))
        for note in pool.notes:
            self.report.note(note)
        return pool

    def check_kind(self, pool: Pool) -> None:
        wanted = self.tokens.eats or (self.objective.kind,)
        if pool.kind not in wanted and not (
            wanted == ("sft",) and pool.kind == "prompts" and self.settings.stages == ["eval"]
        ):
            advice = {
                "sft": "objective=sft",
                "text": "recipe=cpt (objective=text)",
                "pairs": "recipe=dpo (objective=dpo)",
                "labels": "recipe=classify_lora (task=classify)",
                "prompts": "a format with responses",
            }
            raise DataError(
                f"{self._eater()} on {' or '.join(wanted)} rows; these are {pool.kind} rows (format {pool.format})",
                f"data.path={self.settings.data.path}",
                f"Use {advice.get(pool.kind, 'another objective')}, or name the layout with data.format and data.columns.",
            )

    def _eater(self) -> str:
        """Who says which kind of rows this run takes, and the verb that goes with it."""
        if self.tokens.eats:
            return f"tokens={self.settings.choice('tokens')} works"
        return f"{self.settings.choice('objective')} trains"

    def _split(self, pool: Pool) -> Pool:
        """Put the held-out rows aside; returns the rest."""
        train, heldout = train_and_heldout(pool, self.settings.data, self.work, self.settings.seed)
        for note in train.notes[len(pool.notes) :]:
            self.report.note(note)
        self.ctx.heldout = heldout if len(heldout) else None
        self.report.note(f"{len(train):,} rows to train on, {len(heldout):,} held out")
        if not len(heldout) and "eval" in self.settings.stages:  # said now, not after hours of training
            for evaluator in self.settings.evaluators():
                if evaluator.asks_heldout:
                    raise nothing_held_out(evaluator.name, self.ctx)
        return train

    def select(self, pool: Pool) -> Pool:
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
                "named models": [fingerprint(ModelConfig(path=path)) for path in picker_of(settings).models()],
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
                files = [folder / name for name in (*FILES, *SOMETIMES)]
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
        lengths = np.asarray(self.tokens.input_lengths(table)).reshape(len(table), -1).sum(axis=1)
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

    def edit(self, pool: Pool) -> Pool:
        """The rows as the token policy rewrites them, held-out rows too where the model will need it."""
        if not self.tokens.edits:
            return pool
        if self.tokens.edit_uses_model:
            self.load_model()
        self.report.stage("tokens", self.settings.choice("tokens"))
        if self.tokens.edits_heldout and self.ctx.heldout is not None:
            self.ctx.heldout = edit_rows(self.tokens, self.ctx.heldout, self.ctx, "edited_heldout")
        return edit_rows(self.tokens, pool, self.ctx)

    def weigh(self, table: TokenTable, pool: Pool) -> TokenTable:
        """The table of these rows with the token policy's weights and what it remembers of the tokens."""
        if self.tokens.static or self.tokens.remembers or self.settings.tokens.from_run:
            self.report.stage("tokens", self.settings.choice("tokens"))
            assert self.ctx.bundle is not None
            table = with_roles(table, pool, self.ctx.bundle.tokenizer, self.settings.data.train_on)
        return run_tokens(self.tokens, table, self.ctx)

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
        trainer = self.set_up(table)
        self.counts["trainable"] = sum(p.numel() for p in trainer.parameters.values() if p.requires_grad)
        self._warn_of_large_steps(table, bundle.architecture)
        steps = trainer.plan.steps
        share = self.counts["trainable"] / max(1, self.counts["total"])
        self.report.note(
            f"{self.counts['trainable']:,} parameters train, {share:.2%} of the model's {self.counts['total']:,}; {_counted(table)}, {steps:,} step{'s' * (steps != 1)}"
        )
        if path:
            self.report.note(f"resuming from {path.name}")
        if settings.train.trackers:
            self.ctx.team.accelerator.init_trackers("ftrun", config={"recipe": settings.recipe})
        trainer.run(self.signals, path)
        if settings.train.load_best:
            trainer.load_best()
        self._save(trainer.adapter)
        if "eval" in settings.stages:
            self._evaluate("final")

    def set_up(self, table: TokenTable) -> Trainer:
        """What trains the loaded model on ``table``; the adapter is on it afterwards."""
        settings, bundle = self.settings, self.ctx.bundle
        assert bundle is not None
        adapter: Adapter = settings.component("adapter")
        original = self._copy_for_reference(adapter, bundle.model)
        torch.manual_seed(settings.seed)
        if self.selected is not None:
            self.ctx.begin = training_order(table, self.ctx)
        quant = settings.component("quant")
        bundle.model = quant.prepare(bundle.model, settings.train.gradient_checkpointing)
        self.trainer = set_up(
            self.ctx,
            bundle,
            table,
            adapter=adapter,
            objective=self.objective,
            tokens=self.tokens,
            optim=settings.component("optim"),
            schedule=settings.component("schedule"),
            evaluate=self._heldout_loss
            if self.ctx.heldout_tokens is not None and len(self.ctx.heldout_tokens)
            else None,
            reference=self._reference(adapter, original),
        )
        return self.trainer

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
        if self.tokens.edits_heldout and self.ctx.heldout is not None:
            if self.ctx.team.is_main:  # other rows may have been evaluated before
                (self.ctx.out / "selection" / f"{EVALUATED}.jsonl").unlink(missing_ok=True)
            self.ctx.heldout = edit_rows(self.tokens, self.ctx.heldout, self.ctx, EVALUATED)
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


def _counted(table: TokenTable) -> str:
    """``40 rows``, or ``12 rows in 40 pieces`` where long texts were split: the pieces are what a step draws."""
    pieces = int(table.continues.sum())
    return f"{len(table) - pieces:,} rows" + (f" in {len(table):,} pieces" if pieces else "")
