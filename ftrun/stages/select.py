"""The first stage: score the rows of a pool and pick, or reuse what was picked before."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from ftrun import registry
from ftrun.config.settings import ModelConfig, Settings
from ftrun.data.encode import tokenizer_fingerprint
from ftrun.data.pool import Pool
from ftrun.data.render import apply_template
from ftrun.models.bundle import Bundle
from ftrun.models.load import fingerprint, load_bundle, load_tokenizer, resolved
from ftrun.runs import stagecache
from ftrun.runs.artifacts import digest
from ftrun.runs.stagecache import Key, key_of
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
    tokenizer = load_tokenizer(model)
    if settings.task == "causal" or settings.select.model_path:
        apply_template(tokenizer, model.template)
    key = _key(pool, model, tokenizer, ctx)
    hit = stagecache.fetch(key, folder) if ctx.team.is_main else None
    if ctx.team.gather_object(hit)[0]:
        ctx.report.note("the same selection was made before: reused")
    else:
        run_selection(settings, pool, lambda: _scoring_bundle(model, ctx, load_model), ctx, tokenizer, shared)
        if ctx.team.is_main:
            files = [folder / name for name in (*FILES, *SOMETIMES)]
            stagecache.keep(key, [file for file in files if file.exists()])
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


def _own_model(settings: Settings) -> bool:
    """Whether the run's own model scores, as it is loaded for training."""
    return settings.select.model_path is None and settings.task == "causal"


def _key(pool: Pool, model: ModelConfig, tokenizer: Any, ctx: Context) -> Key:
    """What the selection depends on. The learning rate is not in it, nor is a method that does not run."""
    settings, device = ctx.settings, ctx.team.device
    scorer, picker = settings.component("select"), picker_of(settings)
    quant = settings.slots["quant"] if _own_model(settings) else ("none", {})
    what = {
        "settings": {
            "select": settings.as_dict()["select"],
            "budget": settings.budget,
            "seed": settings.seed,
            "data": settings.as_dict()["data"],
        },
        "rows": {
            "pool": [pool.fingerprint, pool.chosen],
            "queries": load_queries(settings).fingerprint if settings.select.queries else None,
            "files": load_rows(settings, scorer.files()).fingerprint,
        },
        "model": resolved(model, device) | {"quant": quant, "tokenizer": tokenizer_fingerprint(tokenizer)},
        "named models": [fingerprint(ModelConfig(path=path)) for path in picker.models()],
    }
    chosen = {"select": [scorer.name], "picker": [settings.choice("picker"), picker.name], "quant": [quant[0]]}  # type: ignore[attr-defined]
    return key_of("select", what, modules=[__name__], chosen=chosen | {"tokens": []})


def _scoring_bundle(model: ModelConfig, ctx: Context, load_model: Callable[[], None]) -> Bundle:
    if _own_model(ctx.settings):
        load_model()
        assert ctx.bundle is not None
        return ctx.bundle
    bundle = load_bundle(model, task="causal", quant=registry.build("quant", "none"), device=ctx.team.device)
    apply_template(bundle.tokenizer, model.template)
    return bundle
