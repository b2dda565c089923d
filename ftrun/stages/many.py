"""Several recipes select from one pool, in one run, so that their choices can be compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from ftrun.config.compose import Composed
from ftrun.config.settings import Settings
from ftrun.data.pool import Pool
from ftrun.runs.artifacts import write_text
from ftrun.select.content import Content
from ftrun.select.run import written_beside
from ftrun.select.scoring.shared import Shared, scoring_model
from ftrun.stages.chain import Chain
from ftrun.stages.recorded import carry_out
from ftrun.training.context import Context
from ftrun.training.signals import StopSignals


def select_together(settings: Settings, methods: Sequence[Composed], command: list[str]) -> dict[str, Any]:
    """Select by every one of ``methods`` below selection/<recipe>/; returns the summary of the run.

    ``settings``: what the run as a whole goes by. The pool is read once, and recipes that score with the same model
    share its passes. Raises FtrunError.
    """
    settings.stages = ["select"]
    return carry_out(settings, lambda ctx, signals: Selections(ctx, methods, command, signals))


class Selections(Chain):
    """A run of nothing but selections."""

    def __init__(self, ctx: Context, methods: Sequence[Composed], command: list[str], signals: StopSignals):
        super().__init__(ctx, Composed(ctx.settings, None), command, signals)
        self.chains = {name_of(one): Chain(self._context(one), one, command, signals) for one in methods}

    def _context(self, method: Composed) -> Context:
        return replace(self.ctx, settings=method.settings, selects_in=f"selection/{name_of(method)}")

    def identity(self) -> dict[str, Any]:
        return {"recipe": self.settings.recipe, "of": {name: one.identity() for name, one in self.chains.items()}}

    def resolved(self) -> dict[str, Any]:
        """What all recipes agree in; the whole config of each lies in its own folder."""
        shared = agreed([chain.resolved() for chain in self.chains.values()])
        return shared | {"recipe": self.settings.recipe, "out": self.settings.out}

    def stages(self) -> None:
        pool = self.rows.read()
        self.ctx.facts["data"] = pool.fingerprint
        shared = Shared(self.ctx.selection / "shards", Content(pool, self.settings.seed))
        for name in self._by_model():
            self._select_by(name, pool, shared)
        self.ctx.team.barrier()
        if self.ctx.team.is_main:
            write_joined(self.ctx, list(self.chains))
            shutil.rmtree(shared.shards, ignore_errors=True)

    def _by_model(self) -> list[str]:
        """The recipes, those with the same scoring model next to each other."""
        models = [scoring_model(chain.settings) for chain in self.chains.values()]
        return sorted(self.chains, key=lambda name: models.index(scoring_model(self.chains[name].settings)))

    def _select_by(self, name: str, pool: Pool, shared: Shared) -> None:
        chain = self.chains[name]
        model = scoring_model(chain.settings)
        for other in [key for key in shared.engines if key != model]:
            del shared.engines[other]  # its model may leave the memory
        chain.shared = shared
        if self.ctx.team.is_main:
            write_text(chain.ctx.selection / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(chain.resolved())))
        for note in chain.composed.notes:
            self.report.note(note)
        chain.rows.check_kind(pool)
        chain.select(pool)
        self.ctx.facts |= {f"selection {name}": chain.ctx.facts.get("selection")}

    def close(self, status: str, error: Exception | None) -> dict[str, Any]:
        self.counts.setdefault("total", max(chain.counts.get("total", 0) for chain in self.chains.values()))
        return super().close(status, error)

    def extra_summary(self) -> dict[str, Any]:
        """What every recipe chose, as its own summary says."""
        files = {name: chain.ctx.selection / "summary.json" for name, chain in self.chains.items()}
        return {"selections": {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}}


def name_of(method: Composed) -> str:
    return str(method.settings.recipe)


def agreed(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The keys, at any depth, that have the same value in all of these."""
    first, *others = configs
    kept: dict[str, Any] = {}
    for key, value in first.items():
        found = [other[key] for other in others if key in other]
        if len(found) < len(others):
            continue
        if isinstance(value, dict) and value and all(isinstance(other, dict) for other in found):
            if inside := agreed([value, *found]):
                kept[key] = inside
        elif all(other == value for other in found):
            kept[key] = value
    return kept


def write_joined(ctx: Context, names: Sequence[str]) -> None:
    """selection/scores.parquet: ``id``, and of every recipe ``<recipe>.<column>``, ``.selected`` and ``.rank``."""
    columns: dict[str, pa.ChunkedArray] = {}
    for name in names:
        table = pq.read_table(ctx.selection / name / "scores.parquet")
        columns.setdefault("id", table["id"])
        columns |= {f"{name}.{column}": table[column] for column in table.column_names if column != "id"}
    with written_beside(ctx.selection / "scores.parquet") as beside:
        pq.write_table(pa.table(columns), beside)
