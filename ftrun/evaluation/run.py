"""Running evaluators on a model, and writing what they find."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftrun.errors import ConfigError
from ftrun.evaluation.base import Evaluation, Evaluator, Metric, higher_is_better
from ftrun.models.inference import evaluating
from ftrun.runs.artifacts import digest, sha256, strict, write_json, write_text

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

Results = dict[str, dict[str, dict[str, Any]]]


def evaluate_all(
    evaluators: Sequence[Evaluator],
    bundle: Bundle,
    ctx: Context,
    tag: Literal["before", "final"] = "final",
    beside: Results | None = None,
) -> Results:
    """Metrics of every evaluator, ``{evaluator: {metric: {value, stderr, n, rows}}}``, on every process.

    ``rows`` is a digest of what was asked: numbers with different ones are never compared. Process 0 writes
    eval/results.json and eval/predictions/, or for ``before`` eval/before.json and eval/predictions/before/; results of
    other evaluators, ``beside``, are kept in the file. A value that is not a finite number is null. The model's modes
    and all random generators are afterwards as they were, so evaluating does not change a training that goes on.
    """
    results: Results = {}
    names = [evaluator.name for evaluator in evaluators]  # type: ignore[attr-defined]
    if len(set(names)) < len(names):
        raise ConfigError("an evaluator was asked for twice", f"eval={','.join(names)}", "Name each evaluator once.")
    folder = ctx.evaluation
    predictions = folder / "predictions" / "before" if tag == "before" else folder / "predictions"
    for name, evaluator in zip(names, evaluators, strict=True):
        with evaluating(bundle.model):
            found = evaluator.evaluate(bundle, ctx)
        rows = asked(evaluator, ctx)
        results[name] = {metric: entry(metric, value) | {"rows": rows} for metric, value in found.metrics.items()}
        if ctx.team.rank == 0 and found.predictions:
            write_text(predictions / f"{name}.jsonl", _lines(found))
    if ctx.team.rank == 0:
        write_json(folder / ("before.json" if tag == "before" else "results.json"), (beside or {}) | results)
    return results


def asked(evaluator: Evaluator, ctx: Context) -> str:
    """Digest of what an evaluator asks: its knobs, the files that they name, and the held-out rows with their tokens."""
    knobs = {name: value for name, value in asdict(evaluator).items() if not name.startswith("batch")}
    files = [value for value in knobs.values() if isinstance(value, str) and Path(value).is_file()]
    return digest([knobs, [sha256(Path(file)) for file in files], rows_digest(ctx)])


def rows_digest(ctx: Context) -> list[str | None]:
    """What tells the held-out rows of two evaluations apart: what they say, and how it was rendered."""
    rows, tokens = ctx.heldout, ctx.heldout_tokens
    return [rows.fingerprint if rows is not None else None, tokens.fingerprint() if tokens is not None else None]


def entry(name: str, metric: Metric) -> dict[str, Any]:
    """One metric as results.json holds it; the direction is said only where the name would suggest the other one."""
    plain: dict[str, Any] = strict({"value": metric.value, "stderr": metric.stderr, "n": metric.n})
    if metric.higher_is_better != higher_is_better(name):
        plain["higher_is_better"] = metric.higher_is_better
    return plain


def _lines(found: Evaluation) -> str:
    lines = (json.dumps(strict(row), ensure_ascii=False, allow_nan=False, default=str) for row in found.predictions)
    return "".join(line + "\n" for line in lines)
