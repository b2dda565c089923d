"""The first stage: score the rows of a pool and pick, or reuse what was picked before."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import numpy as np

from ftrun import registry
from ftrun.config.settings import ModelConfig
from ftrun.data.pool import Pool
from ftrun.data.render import apply_template
from ftrun.models.bundle import Bundle
from ftrun.models.load import fingerprint, load_bundle, load_tokenizer
from ftrun.runs import lockfile, stagecache
from ftrun.runs.artifacts import digest
from ftrun.select.order import picker_of
from ftrun.select.queries import load_queries, load_rows
from ftrun.select.run import FILES, SOMETIMES, run_selection
from ftrun.select.scoring.shared import Shared
from ftrun.training.context import Context


def select(pool: Pool, ctx: Context, load_model: Callable[[], None], shared: Shared | None = None) -> np.ndarray:
    """Numbers of the picked rows, best first; reused when nothing that they depend on has changed.

    ``load_model`` puts the run's own model into ``ctx.bundle``, where the method scores with it.
    """
    settings, folder = ctx.settings, ctx.selection
    ctx.report.stage("select", f"{settings.choice('select')} over {len(pool):,} rows")
    model = _model(ctx)
    key = _key(pool, model, ctx)
    hit = stagecache.fetch("select", key, folder) if ctx.team.is_main else None
    if ctx.team.gather_object(hit)[0]:
        ctx.report.note("the same selection was made before: reused")
    else:
        tokenizer = load_tokenizer(model)
        if settings.task == "causal" or settings.select.model_path:
            apply_template(tokenizer, model.template)
        run_selection(settings, pool, lambda: _scoring_bundle(model, ctx, load_model), ctx, tokenizer, shared)
        if ctx.team.is_main:
            files = [folder / name for name in (*FILES, *SOMETIMES)]
            stagecache.keep("select", key, [file for file in files if file.exists()])
    ctx.team.barrier()
    with (folder / "selected.jsonl").open() as lines:
        selected = np.array([json.loads(line)["id"] for line in lines], dtype=np.int64)
    ctx.facts["selection"] = digest(selected.tolist())
    return selected


def _model(ctx: Context) -> ModelConfig:
    """The model that scores: the run's own, unless select.model.path names another."""
    settings = ctx.settings
    if settings.select.model_path:
        return ModelConfig(path=settings.select.model_path, dtype=settings.model.dtype)
    return copy.copy(settings.model)


def _key(pool: Pool, model: ModelConfig, ctx: Context) -> str:
    """A digest of everything that a selection depends on."""
    settings = ctx.settings
    return digest(
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


def _scoring_bundle(model: ModelConfig, ctx: Context, load_model: Callable[[], None]) -> Bundle:
    settings = ctx.settings
    if settings.select.model_path is None and settings.task == "causal":
        load_model()
        assert ctx.bundle is not None
        return ctx.bundle
    bundle = load_bundle(model, task="causal", quant=registry.build("quant", "none"), device=ctx.team.device)
    apply_template(bundle.tokenizer, model.template)
    return bundle
