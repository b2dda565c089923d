"""The training section of the report: loss over steps, and what else was measured on the way."""

from __future__ import annotations

import numpy as np

from ftrun.reporting.markup import Markup, tag
from ftrun.reporting.plots import Series, line_chart, robust_range, smooth
from ftrun.reporting.run import Run
from ftrun.runs import numbers

MEASURED = ("lr", "grad_norm", "tokens_per_s", "memory_bytes")
EVALUATIONS = ("eval_loss", "heldout_loss")
NOT_PARTS = {"step", "tokens", "loss", "epoch", "time", "wall_s", *MEASURED, *EVALUATIONS}


def training_section(run: Run) -> Markup | None:
    """The loss large, the rest small; None when no step was logged."""
    parts = [_loss(run), _small(run)]
    return Markup("".join(part for part in parts if part)) or None


def _loss(run: Run) -> Markup | None:
    steps, loss = run.series("loss")
    shown: list[Series] = []
    caption: list[Markup | str] = []
    if len(steps):
        window = max(1, len(steps) // 20)
        if window > 2:
            shown = [Series("loss", steps, loss, "faint"), Series("smoothed", steps, smooth(loss, window), "line")]
            caption = [_key("faint", "training loss of each step"), _key("line", f"mean over {window} steps")]
        else:
            shown = [Series("loss", steps, loss, "line")]
            caption = [_key("line", "training loss of each step")]
    for name in EVALUATIONS:
        at, values = run.series(name)
        if len(at):
            shown.append(Series("held-out loss", at, values, "held"))
            shown.append(Series("held-out loss", at, values, "dots"))
            caption.append(_key("dots", "held-out loss"))
            break
    if not shown:
        return None
    shown = shown[:-1] if shown[-1].look == "dots" and len(shown[-1].x) > 80 else shown
    plot = line_chart(_named_once(shown), "loss over optimiser steps", height=300)
    return tag("figure", plot, tag("figcaption", *caption, _remarks(loss)))


def _named_once(series: list[Series]) -> list[Series]:
    """Dots first lose their name when a line of the same values carries it."""
    return [one for one in series if not (one.look == "held" and len(one.x) == 1)]


def _small(run: Run) -> Markup | None:
    others = {
        key
        for line in run.metrics
        for key, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    figures = []
    for key in (*MEASURED, *sorted(others - NOT_PARTS)):
        steps, values = run.series(key)
        if len(steps):
            figures.append(_one(key, steps, values))
    return tag("div", *figures, class_="small-multiples") if figures else None


def _one(key: str, steps: np.ndarray, values: np.ndarray) -> Markup:
    memory = key == "memory_bytes"
    plot = line_chart(
        [Series(numbers.label(key), steps, values)],
        f"{numbers.label(key)} over optimiser steps",
        width=370,
        height=150,
        zero=key in MEASURED,
        value_format=numbers.size if memory else numbers.plain,
        tick_format=numbers.size if memory else None,
        x_label="",
    )
    return tag("figure", plot, tag("figcaption", numbers.label(key), _remarks(values, key in MEASURED)))


def _remarks(values: np.ndarray, zero: bool = False) -> Markup | None:
    """What the picture cannot show as it is."""
    finite = values[np.isfinite(values)]
    low, high = robust_range(values, zero)
    beyond = finite[(finite > high) | (finite < low)]
    words = []
    if len(finite) < len(values):
        words.append(f"× {len(values) - len(finite):,} not finite")
    if len(beyond):
        words.append(f"{len(beyond):,} beyond the frame ({numbers.plain(float(max(beyond, key=abs)))})")
    return tag("span", " ", " · ".join(words), class_="muted key") if words else None


def _key(look: str, words: str) -> Markup:
    return tag("span", tag("span", class_=f"swatch {look}"), words, class_="key")
