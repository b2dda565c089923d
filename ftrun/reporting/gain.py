"""What a run gained and how, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftrun.reporting.changes import Change, Measured
from ftrun.reporting.run import Run
from ftrun.runs import numbers

BITS = {"nf4": "4 bits", "int8": "8 bits"}
SHARES = ("accuracy", "acc", "match", "f1")  # words of metrics that are read in per cent
ASIDE = ("finished", "token_accuracy", "perplexity")  # say again, or less than, what stands beside them


def gain(run: Run) -> str:
    """The sentence; empty when nothing was measured both before and after training."""
    told = _told(run.changes)
    if not told or not run.summary.get("steps"):
        return ""
    clauses = ", ".join(_clause(change) for change in told)
    none = "" if any(change.verdict == "better" for change in told) else "no gain beyond the interval: "
    sentence = f"{none}{clauses}, {_how(run)}."
    return sentence[0].upper() + sentence[1:]


def _told(changes: Sequence[Change]) -> list[Change]:
    """The first metric with a better side of every evaluator, the loss last."""
    first: dict[str, Change] = {}
    for change in changes:
        if change.verdict and change.higher_is_better is not None and change.metric not in ASIDE:
            first.setdefault(change.evaluator, change)
    return sorted(first.values(), key=lambda change: change.evaluator == "heldout")


def _clause(change: Change) -> str:
    assert change.before is not None and change.after is not None
    name, before, after = _name(change), _value(change, change.before), _value(change, change.after)
    if change.verdict == "same":
        return f"{name} stayed at {after}"
    if change.verdict not in ("better", "worse"):
        return f"{name} went from {before} to {after} (within the interval)"
    notes = ["beyond the interval" if change.stderr is not None else "of unknown interval"]
    notes += ["which is worse"] if change.verdict == "worse" else []
    verb = "rose" if (change.delta or 0) > 0 else "fell"
    return f"{name} {verb} from {before} to {after} ({', '.join(notes)})"


def _name(change: Change) -> str:
    metric, rows = change.metric.replace("_", " "), change.after.n if change.after else 0
    if change.evaluator == "heldout":
        return f"held-out {metric}"
    of = f"{rows:,} held-out row{'s' * (rows != 1)}"
    if change.evaluator == "generation":
        return f"{metric} on {of}"
    return f"{change.evaluator.replace('_', ' ')} {metric}" + (f" (n = {rows:,})" if rows else "")


def _value(change: Change, side: Measured) -> str:
    if any(word in SHARES for word in change.metric.lower().split("_")) and 0 <= side.value <= 1:
        return f"{side.value:.0%}" if side.n < 1000 else f"{side.value:.1%}"
    return numbers.pair(side.value, side.stderr)[0]


def _how(run: Run) -> str:
    """``by training 0.7% of the parameters on 4-bit weights, 60 steps on 96 of 240 rows chosen by superfiltering``."""
    trained, total = run.summary.get("trainable_parameters") or 0, run.summary.get("total_parameters") or 0
    what = "all parameters" if trained == total else f"{_share(trained / total)} of the parameters" if total else "it"
    quant = BITS.get(_component(run, "quant"))
    base = f" beside weights in {quant}" if quant else ""
    steps = run.summary["steps"]
    return f"by training {what}{base} for {steps:,} step{'s' * (steps != 1)}{_rows(run)}"


def _rows(run: Run) -> str:
    chosen, pool, method = run.summary.get("selected_rows"), run.selection.get("pool"), _component(run, "select")
    if not chosen or not pool or not method:
        return ""
    return f" on {chosen:,} of {pool:,} rows chosen by {method}"


def _share(value: float) -> str:
    """Two digits of a share: ``0.34%``, ``3.6%``, ``12%``."""
    return f"{100 * value:.2g}%" if value < 0.995 else f"{value:.1%}"


def _component(run: Run, slot: str) -> str:
    chosen: Any = run.config.get(slot)
    return str(chosen.get("name") or "") if isinstance(chosen, dict) else ""
