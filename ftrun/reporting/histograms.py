"""Distributions and intervals as inline SVG."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ftrun.reporting.changes import Change, Measured
from ftrun.reporting.markup import Markup, tag
from ftrun.reporting.plots import Frame, robust_range, tick_text, ticks
from ftrun.runs import numbers


def histogram(
    values: np.ndarray,
    picked: np.ndarray | None,
    title: str,
    x_label: str,
    width: float = 760,
    height: float = 220,
    unit: str = "rows",
) -> Markup:
    """Counts of finite values, those of ``picked`` (mask of the same length) shaded. The end bins hold what lies beyond."""
    finite = np.isfinite(values)
    values, picked = values[finite], picked[finite] if picked is not None else None
    edges = _edges(values, 48 if width > 500 else 26)
    inside = np.clip(values, edges[0], edges[-1])
    counts = np.histogram(inside, edges)[0]
    chosen = np.histogram(inside[picked], edges)[0] if picked is not None else None
    frame = _frame(edges, float(counts.max(initial=1)), width, height, x_label, numbers.quantity)
    bars = []
    for index, count in enumerate(counts):
        if not count:
            continue
        words = f"{_between(edges, index)}: {count:,} {unit}" + (
            f", {chosen[index]:,} picked" if chosen is not None else ""
        )
        parts = [tag("title", words), _bar(frame, edges, index, float(count), "picked" if chosen is None else "all")]
        if chosen is not None and chosen[index]:
            parts.append(_bar(frame, edges, index, float(chosen[index]), "picked"))
        bars.append(tag("g", *parts, class_="bin"))
    return frame.svg(*bars, title=title, class_="wide" if width > 500 else "small")


def compared(
    pool: np.ndarray, choice: np.ndarray, title: str, x_label: str, width: float = 760, height: float = 200
) -> Markup:
    """Two distributions as shares of their own size: the pool as an outline, the choice filled."""
    edges = _edges(pool[np.isfinite(pool)], 36, whole=True)
    shares = []
    for values in (pool, choice):
        counts = np.histogram(np.clip(values[np.isfinite(values)], edges[0], edges[-1]), edges)[0]
        shares.append(100 * counts / max(1, counts.sum()))
    frame = _frame(
        edges, float(max(share.max(initial=0) for share in shares)) or 1.0, width, height, x_label, lambda v: f"{v:g}%"
    )
    bars, outline = [], []
    for index, (all_share, share) in enumerate(zip(*shares, strict=True)):
        words = f"{_between(edges, index)}: {all_share:.1f}% of the pool, {share:.1f}% of the choice"
        full = tag(
            "rect",
            x=frame.px(edges[index]),
            y=frame.top,
            width=frame.px(edges[index + 1]) - frame.px(edges[index]),
            height=frame.height - frame.bottom - frame.top,
            class_="area",
        )
        bars.append(tag("g", tag("title", words), _bar(frame, edges, index, share, "picked"), full, class_="bin"))
        outline.append(
            f"{'M' if not outline else 'L'}{frame.px(edges[index]):.1f} {frame.py(all_share):.1f}H{frame.px(edges[index + 1]):.1f}"
        )
    return frame.svg(
        *bars, tag("path", d="".join(outline), class_="outline"), title=title, class_="wide" if width > 500 else "small"
    )


def scatter(x: np.ndarray, y: np.ndarray, title: str, x_label: str, y_label: str, side: float = 370) -> Markup:
    """Pairs of values on one scale, with the diagonal."""
    low, high = robust_range(np.concatenate([x, y]))
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    marks = ticks(low, high, count=5)

    def tick(value: float) -> str:
        return tick_text(value, marks)

    frame = Frame(side, side * 0.9, (low, high), (low, high), marks, marks, tick, tick, x_label)
    points = []
    for a, b in zip(np.clip(x, low, high), np.clip(y, low, high), strict=True):
        words = f"{x_label} {numbers.plain(float(a))}, {y_label} {numbers.plain(float(b))}"
        points.append(tag("circle", tag("title", words), cx=frame.px(a), cy=frame.py(b), r=2.6, class_="point"))
    diagonal = tag("line", x1=frame.px(low), y1=frame.py(low), x2=frame.px(high), y2=frame.py(high), class_="diagonal")
    label = tag("text", y_label, x=frame.left + 6, y=frame.top + 8, class_="tick label")
    return frame.svg(diagonal, *points, label, title=title, class_="small")


def interval(change: Change, width: float = 190, height: float = 34) -> Markup:
    """Before and after on one scale with two standard errors either side."""
    sides = [side for side in (change.before, change.after) if side and np.isfinite(side.value)]
    if len(sides) < 2:
        return Markup("")
    reach = [(side.value - 2 * (side.stderr or 0), side.value + 2 * (side.stderr or 0)) for side in sides]
    low, high = min(r[0] for r in reach), max(r[1] for r in reach)
    if low == high:
        low, high = low - 1, high + 1

    def px(value: float) -> float:
        return 8 + (value - low) / (high - low) * (width - 16)

    parts = []
    for side, y, look in (
        (change.before, 10, "before"),
        (change.after, 24, f"after {change.verdict.replace(' ', '-')}"),
    ):
        assert side is not None
        parts.append(_whisker(side, px, y, look))
    words = f"{change.evaluator} {change.metric}: before above, after below, with two standard errors either side"
    return tag("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", class_="interval", role="img", aria_label=words)


def _whisker(side: Measured, px: Callable[[float], float], y: float, look: str) -> Markup:
    text = " ± ".join(part for part in numbers.pair(side.value, side.stderr) if part)
    error = 2 * (side.stderr or 0)
    line = tag("line", x1=px(side.value - error), x2=px(side.value + error), y1=y, y2=y)
    return tag("g", tag("title", text), line, tag("circle", cx=px(side.value), cy=y, r=4), class_=look)


def _edges(values: np.ndarray, bins: int, whole: bool = False) -> np.ndarray:
    low, high = robust_range(values)
    if len(values) >= 20:  # a long tail would squeeze all rows into one bar: Tukey's outer fences
        quarter, three = (float(value) for value in np.percentile(values, [25, 75]))
        reach = 3 * (three - quarter)
        if reach > 0:
            low, high = max(low, quarter - reach), min(high, three + reach)
    if whole:
        step = max(1, int(np.ceil((high - low + 1) / bins)))
        return np.arange(np.floor(low), np.ceil(high) + step + 0.5, step)
    distinct = len(np.unique(values[:5000]))
    return np.linspace(low, high, min(bins, max(6, distinct)) + 1)


def _frame(
    edges: np.ndarray, top: float, width: float, height: float, x_label: str, y_format: Callable[[float], str]
) -> Frame:
    x, y = (float(edges[0]), float(edges[-1])), (0.0, top * 1.04)
    x_ticks, y_ticks = (
        ticks(*x, count=8 if width > 500 else 4),
        ticks(*y, count=4 if height > 150 else 3, whole=top >= 3),
    )
    return Frame(width, height, x, y, x_ticks, y_ticks, lambda value: tick_text(value, x_ticks), y_format, x_label)


def _bar(frame: Frame, edges: np.ndarray, index: int, value: float, look: str) -> Markup:
    left, right = frame.px(float(edges[index])), frame.px(float(edges[index + 1]))
    gap = 1.0 if right - left > 5 else 0.4
    floor = frame.height - frame.bottom
    return tag(
        "rect",
        x=left + gap / 2,
        y=frame.py(value),
        width=max(0.5, right - left - gap),
        height=floor - frame.py(value),
        class_=f"bar {look}",
    )


def _between(edges: np.ndarray, index: int) -> str:
    first, last = index == 0, index == len(edges) - 2
    if first or last:
        return f"up to {numbers.plain(float(edges[1]))}" if first else f"{numbers.plain(float(edges[-2]))} and more"
    return f"{numbers.plain(float(edges[index]))} to {numbers.plain(float(edges[index + 1]))}"
