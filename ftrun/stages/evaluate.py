"""The fourth stage: evaluators on the model as it is."""

from __future__ import annotations

from typing import Literal

from ftrun import registry
from ftrun.evaluation.run import Results, evaluate_all, evaluating
from ftrun.training.context import Context


def heldout_loss(ctx: Context) -> float:
    """The loss that decides which checkpoint is best."""
    assert ctx.bundle is not None
    name = "classification" if ctx.settings.task == "classify" else "heldout"
    with evaluating(ctx.bundle.model):
        return registry.build("eval", name).evaluate(ctx.bundle, ctx).metrics["loss"].value


def evaluate(
    ctx: Context, tag: Literal["before", "final"], beside: Results | None = None
) -> dict[str, dict[str, float]]:
    """Values by evaluator and metric; what they rest on lies below eval/ of the run, with other results ``beside``."""
    evaluators = ctx.settings.evaluators()
    if not evaluators:
        return {}
    assert ctx.bundle is not None
    ctx.report.stage("evaluate", "before training" if tag == "before" else "")
    results = evaluate_all(evaluators, ctx.bundle, ctx, tag, beside)
    return {
        evaluator: {name: entry["value"] for name, entry in metrics.items()} for evaluator, metrics in results.items()
    }
