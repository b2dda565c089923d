"""``ftrun eval``: evaluators on a run, or on any model."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ftrun.config import keys
from ftrun.config.compose import Composed
from ftrun.config.saved import load_settings
from ftrun.config.settings import Settings
from ftrun.errors import ConfigError
from ftrun.evaluation.run import Results, asked, rows_digest
from ftrun.reporting.html import write_report
from ftrun.reporting.terminal import evaluation_table, results_table
from ftrun.runs.artifacts import RunLock, digest, new_run_folder, write_json
from ftrun.runs.state import holds_work
from ftrun.scrub import scrubbed
from ftrun.stages.chain import Chain
from ftrun.stages.evaluate import evaluate as run_evaluators
from ftrun.stages.heldout import SOURCE, evaluated_rows, settle
from ftrun.stages.trained import check_trained, labels_of, load_trained, plain_context
from ftrun.training.context import Context
from ftrun.training.signals import StopSignals

DECIDING = ("model", "data", "tokens", "quant")  # sections beside the evaluators that decide what an evaluation gives


def evaluate(composed: Composed, overrides: Sequence[str]) -> dict[str, Any]:
    """Evaluate a run's model (``run=``), or the model of ``model.path`` on the rows of ``data``.

    Keys named on the command line win over those of the run, one by one. The run's own results are those of its rows
    and settings: any other evaluation lies beside them, below eval/ of the run or in ``out``.
    """
    settings, named = composed.settings, keys.named(overrides)
    if not settings.run and not keys.names(named, "model", "recipe"):
        raise ConfigError("evaluate what?", todo="Give run=RUN or model.path=FOLDER.")
    if not settings.eval:
        raise ConfigError("no evaluator was chosen", f"run={settings.run}", "Add eval=[heldout,generation].")
    settings.data = settle(settings.data, named)
    if settings.out:
        _refuse_taken(Path(settings.out))
    if settings.run:
        return _evaluate_run(settings, named)
    return _evaluate_model(settings, named)


def _evaluate_model(settings: Settings, named: Collection[str]) -> dict[str, Any]:
    out = Path(settings.out or new_run_folder("eval", settings.as_dict()))
    ctx = plain_context(settings, out)
    with RunLock(out), StopSignals() as signals:
        chain = Chain(ctx, Composed(settings, None), [], signals)
        chain.rows.load_for_evaluation(evaluated_rows(settings, None, named, chain.rows.work, ctx), [])
        chain.load_model()
        metrics = run_evaluators(ctx, "final")
        write_json(out / "summary.json", {"recipe": settings.recipe, "status": "done", "metrics": metrics})
        results_table(out, ctx.report)
    return {"metrics": metrics, "out": str(out), "results": str(ctx.evaluation / "results.json")}


def _evaluate_run(settings: Settings, named: Collection[str]) -> dict[str, Any]:
    run, own = load_settings(settings.run)
    check_trained(run)
    ctx = plain_context(settings, run)
    with RunLock(Path(settings.out) if settings.out else run), StopSignals() as signals:
        chain = Chain(ctx, Composed(settings, None), [], signals)
        rows = evaluated_rows(settings, own, named, chain.rows.work, ctx)
        chain.rows.load_for_evaluation(rows, labels_of(run))
        ctx.evaluates_in, beside = _place(run, settings, own, named, ctx)
        ctx.bundle = load_trained(run, settings, ctx.team.device)
        metrics = run_evaluators(ctx, "final", beside)
        if ctx.evaluates_in == "eval":
            write_report(run)
            results_table(run, ctx.report)
        else:
            write_json(ctx.evaluation / "summary.json", scrubbed(_about(run, settings, metrics)))
            evaluation_table(run, ctx.evaluates_in, ctx.report)
    out = run if ctx.evaluates_in == "eval" else Path(settings.out or ctx.evaluation)
    return {"metrics": metrics, "out": str(out), "results": str(ctx.evaluation / "results.json")}


def _place(run: Path, settings: Settings, own: Settings, named: Collection[str], ctx: Context) -> tuple[str, Results]:
    """The folder for the results, below the run, and what is there of other evaluators: eval/ for the run's own rows
    and settings, else a folder beside its own results, one for each set of rows and settings."""
    if settings.out:
        return str(Path(settings.out).resolve() / "eval"), {}
    now = {evaluator.name: asked(evaluator, ctx) for evaluator in settings.evaluators()}
    mine, its = settings.as_dict(), own.as_dict()
    if all(mine[section] == its[section] for section in DECIDING) and _joins(now, found := _results(run / "eval")):
        return "eval", found
    sections = {section: mine[section] for section in DECIDING if section != "data"}
    of = digest([sections, rows_digest(ctx)])
    source = (settings.data.heldout_path or settings.data.path) if keys.names(named, *SOURCE) else "other"
    stem = re.sub(r"[^\w.-]+", "_", Path(str(source)).name.partition(".")[0]) or "other"
    for name in (f"eval/{stem}-{of[:8]}", f"eval/{stem}-{digest([of, now])[:8]}"):
        found = _results(run / name)
        if _joins(now, found):
            return name, found
    return name, {}


def _joins(now: dict[str, str], found: Results) -> bool:
    """Whether what the evaluators ask ``now`` is what their results in a file rest on, as far as it holds them."""
    said = {name: {metric.get("rows") for metric in metrics.values()} for name, metrics in found.items()}
    return all(said.get(name, {rows}) == {rows} for name, rows in now.items())


def _results(folder: Path) -> Results:
    file = folder / "results.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _about(run: Path, settings: Settings, metrics: dict[str, Any]) -> dict[str, Any]:
    """What tells a reader whose numbers these are."""
    summary = run / "summary.json"
    steps = json.loads(summary.read_text()).get("steps") if summary.exists() else None
    plain = settings.as_dict()
    return {
        "recipe": settings.recipe,
        "status": "done",
        "run": str(run),
        "steps": steps,
        "metrics": metrics,
    } | {section: plain[section] for section in DECIDING}


def _refuse_taken(out: Path) -> None:
    if holds_work(out):
        raise ConfigError(f"{out} already holds a run", f"out={out}", "Choose another out=DIR.")
