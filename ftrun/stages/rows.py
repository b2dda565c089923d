"""The rows that a chain works on: read, checked, held out, edited, and as tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ftrun.data.pool import Pool, load_pool, refuse_idle_split, train_and_heldout
from ftrun.data.prepare import Prepared, prepare
from ftrun.data.render import apply_template
from ftrun.data.roles import with_roles
from ftrun.data.tokens import TokenTable
from ftrun.errors import DataError
from ftrun.evaluation.base import nothing_held_out
from ftrun.models.architecture import context_length
from ftrun.models.load import load_config, load_tokenizer
from ftrun.objectives.base import Objective
from ftrun.runs.artifacts import cache_dir, write_json
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.run import edit_rows, run_tokens
from ftrun.training.context import Context

LABELS = "labels.json"  # class names of a classification run
EVALUATED = "edited_evaluated"  # rows that `ftrun eval` asks, as the token policy edits them
DEFAULT_LENGTH = 2048  # tokens of a row, where neither the user nor the model's context says less
ADVICE = {
    "sft": "objective=sft",
    "text": "recipe=cpt (objective=text)",
    "pairs": "recipe=dpo (objective=dpo)",
    "labels": "recipe=classify_lora (task=classify)",
    "prompts": "a format with responses",
    "binary": "the wanted rows alone, without their label, or data.ignore=[label,kto_tag] to train on all",
}


class Rows:
    """Where a chain gets its rows from, for training, evaluation, preview and plan alike."""

    def __init__(self, ctx: Context, objective: Objective, tokens: TokenPolicy):
        self.ctx, self.settings, self.report = ctx, ctx.settings, ctx.report
        self.objective, self.tokens = objective, tokens
        self.labels: list[Any] = []  # class names, for classification
        self.work = cache_dir() / "data"

    def read(self) -> Pool:
        """All rows of ``data.path``. Raises DataError."""
        with self.report.task("reading", None, unit="rows") as bar:
            pool = load_pool(self.settings.data, self.work, self.settings.seed)
            bar.advance(len(pool))
        refuse_idle_split(pool, self.settings.data)
        for note in pool.notes:
            self.report.note(note)
        return pool

    def training(self, evaluates: bool = True) -> Pool:
        """The rows to train on: read, checked, and the held-out rows put aside. Raises DataError, ConfigError.

        A verb that only looks (not ``evaluates``) is told that evaluators would have no rows, and goes on.
        """
        pool = self.read()
        self.check_kind(pool)
        self.ctx.facts["data"] = pool.fingerprint
        return pool if self.settings.stages == ["select"] else self.split(pool, evaluates)

    def check_kind(self, pool: Pool) -> None:
        """Refuse rows that neither the objective nor the token policy takes. Raises DataError."""
        wanted = self.tokens.eats or (self.objective.kind,)
        evaluated = wanted == ("sft",) and pool.kind == "prompts" and self.settings.stages == ["eval"]
        if pool.kind in wanted or evaluated:
            return
        todo = f"Use {ADVICE[pool.kind]}, or name the layout with data.format and data.columns."
        if pool.kind == "binary":
            todo = (
                "No objective reads rows with a good or bad label: write pairs of chosen and rejected for recipe=dpo, "
                "or keep the good rows without their label."
            )
        raise DataError(
            f"{self._eater()} on {' or '.join(wanted)} rows; these are {pool.kind} rows (format {pool.format})",
            f"data.path={self.settings.data.path}",
            todo,
        )

    def _eater(self) -> str:
        """Who says which kind of rows this run takes, and the verb that goes with it."""
        if self.tokens.eats:
            return f"tokens={self.settings.choice('tokens')} works"
        return f"{self.settings.choice('objective')} trains"

    def split(self, pool: Pool, evaluates: bool = True) -> Pool:
        """Put the held-out rows aside; returns the rest."""
        train, heldout = train_and_heldout(pool, self.settings.data, self.work, self.settings.seed)
        for note in train.notes[len(pool.notes) :]:
            self.report.note(note)
        self.ctx.heldout = heldout if len(heldout) else None
        self.report.note(f"{len(train):,} rows to train on, {len(heldout):,} held out")
        if not len(heldout) and "eval" in self.settings.stages:  # said now, not after hours of training
            for evaluator in self.settings.evaluators():
                if not evaluator.asks_heldout:
                    continue
                error = nothing_held_out(evaluator.name, self.ctx)
                if evaluates:
                    raise error
                self.report.warn(f"train would refuse this: {error.what}. {error.todo}")
        return train

    def edit(self, pool: Pool, load_model: Callable[[], None]) -> Pool:
        """The rows as the token policy rewrites them, held-out rows too where the model will need it."""
        if not self.tokens.edits:
            return pool
        if self.tokens.edit_uses_model:
            load_model()
        self.report.stage("tokens", self.settings.choice("tokens"))
        if self.tokens.edits_heldout and self.ctx.heldout is not None:
            self.ctx.heldout = edit_rows(self.tokens, self.ctx.heldout, self.ctx, "edited_heldout")
        return edit_rows(self.tokens, pool, self.ctx)

    def tokenise(self, pool: Pool) -> Prepared:
        """The rows to train on as tokens; those held out too, for ``ctx``."""
        prepared = self.prepare(pool, "training rows")
        self.labels = prepared.labels
        if self.labels and self.ctx.team.is_main:
            write_json(self.ctx.out / LABELS, self.labels)
        self.tokenise_heldout()
        self.ctx.facts["tokens"] = prepared.table.fingerprint()
        return prepared

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

    def weigh(self, table: TokenTable, pool: Pool) -> TokenTable:
        """The table of these rows with the token policy's weights and what it remembers of the tokens."""
        if self.tokens.static or self.tokens.remembers or self.settings.tokens.from_run:
            self.report.stage("tokens", self.settings.choice("tokens"))
            assert self.ctx.bundle is not None
            table = with_roles(table, pool, self.ctx.bundle.tokenizer, self.settings.data.train_on)
        return run_tokens(self.tokens, table, self.ctx)

    def load_for_evaluation(self, rows: Pool, labels: list[Any]) -> None:
        """Take these rows as those to evaluate; ``labels``: class names of a finished classification run."""
        self.labels = labels
        self.ctx.heldout = rows if len(rows) else None
        if self.tokens.edits_heldout and self.ctx.heldout is not None:
            if self.ctx.team.is_main:  # other rows may have been evaluated before
                (self.ctx.out / "selection" / f"{EVALUATED}.jsonl").unlink(missing_ok=True)
            self.ctx.heldout = edit_rows(self.tokens, self.ctx.heldout, self.ctx, EVALUATED)
        self.tokenise_heldout()
