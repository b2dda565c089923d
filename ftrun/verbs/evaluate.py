"""``ftrun eval``: evaluators on a run, or on any model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftrun.config.compose import Composed
from ftrun.config.saved import load_settings
from ftrun.errors import ConfigError
from ftrun.reporting.terminal import results_table
from ftrun.runs.artifacts import RunLock, write_json
from ftrun.stages.chain import Chain
from ftrun.stages.trained import load_trained, plain_context
from ftrun.training.signals import StopSignals


def evaluate(composed: Composed, overrides: Sequence[str]) -> dict[str, Any]:
    """Evaluate a run's model (``run=``), or the model of ``model.path`` on the held-out rows of ``data``.

    Evaluators and data named on the command line win over those of the run.
    """
    asked = composed.settings
    named = {word.partition("=")[0].partition(".")[0] for word in overrides}
    if asked.run:
        run, settings = load_settings(asked.run)
        if "eval" in named:
            settings.eval = asked.eval
        if "data" in named:
            settings.data = asked.data
        settings.launch, settings.run = asked.launch, asked.run
    elif "model" in named or asked.recipe:
        settings = asked
        run = Path(asked.out or f"runs/eval/{time.strftime('%Y%m%d-%H%M%S')}")
    else:
        raise ConfigError("evaluate what?", todo="Give run=RUN or model.path=FOLDER.")
    if not settings.eval:
        raise ConfigError("no evaluator was chosen", f"run={run}", "Add eval=[heldout,generation].")
    ctx = plain_context(settings, run)
    with RunLock(run), StopSignals() as signals:
        chain = Chain(ctx, Composed(settings, None), [], signals)
        chain.rows.load_for_evaluation()
        if asked.run:
            ctx.bundle = load_trained(run, settings, ctx.team.device)
        else:
            chain.load_model()
        chain.evaluate("final")
        results_table(run, ctx.report)
        if not (run / "summary.json").exists():
            write_json(run / "summary.json", {"recipe": settings.recipe, "status": "done", "metrics": chain.metrics})
    return {"metrics": chain.metrics, "out": str(run)}
