"""Plots as inline SVG: a few honest forms, no scripts, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ftrun.reporting.markup import Markup, tag
from ftrun.runs import numbers

POINTS = 600  # more points than this are thinned; every bucket keeps its lowest and highest
SLICES = 160  # strips that show values on hover


@dataclass(frozen=True)
class Series:
    """One curve. ``look`` is a class of the style sheet: line, faint or dots."""

    name: str
    x: np.ndarray
    y: np.ndarray
    look: str = "line"


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About ``count`` round values within [low, high], steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((s * power for s in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(x: np.ndarray, y: np.ndarray, limit: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about ``limit`` points that keep every spike: the lowest and highest of each bucket."""
    if len(x) <= limit:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for bucket in np.array_split(np.arange(len(x)), limit // 2):
        finite = bucket[np.isfinite(y[bucket])]
        if len(finite):
            keep |= {int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])}
        else:
            keep.add(int(bucket[0]))
    order = sorted(keep)
    return x[order], y[order]


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean over finite values; NaN where a window has none. Same length."""
    finite = np.isfinite(y)
    sums, counts = np.cumsum(np.r_[0.0, np.where(finite, y, 0.0)]), np.cumsum(np.r_[0, finite])
    at = np.arange(len(y))
    reach = np.minimum(window // 2, np.minimum(at, len(y) - 1 - at))  # symmetric at the ends, or a slope would be bent
    start, end = at - reach, at + reach + 1
    weight = counts[end] - counts[start]
    return np.where(weight > 0, (sums[end] - sums[start]) / np.maximum(weight, 1), np.nan)


def robust_range(values: np.ndarray, zero: bool = False) -> tuple[float, float]:
    """Lowest and highest value to show; single far outliers are left outside the frame."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if len(values) >= 20:
        inner_low, inner_high = (float(v) for v in np.percentile(values, [2, 98]))
        reach = 4 * (inner_high - inner_low)
        if reach > 0:
            low, high = max(low, inner_low - reach), min(high, inner_high + reach)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high == low:
        spread = abs(high) * 0.1 or 1.0
        low, high = (0.0, high * 1.25) if zero and high > 0 else (low - spread, high + spread)
    return low, high


@dataclass
class Frame:
    """Maps values to the picture and draws its axes. Sizes in CSS pixels of the drawing."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    x_format: Callable[[float], str]
    y_format: Callable[[float], str]
    x_label: str = ""
    top: float = 10
    right: float = 12

    @property
    def bottom(self) -> float:
        return 34 if self.x_label else 22

    @property
    def left(self) -> float:
        return 14 + 7.2 * max((len(self.y_format(v)) for v in self.y_ticks), default=0)

    def px(self, value: float) -> float:
        return self.left + (value - self.x[0]) / (self.x[1] - self.x[0]) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        floor = self.height - self.bottom
        return floor - (value - self.y[0]) / (self.y[1] - self.y[0]) * (floor - self.top)

    def axes(self) -> Markup:
        floor, end = self.height - self.bottom, self.width - self.right
        parts = []
        for value in self.y_ticks:
            parts.append(tag("line", x1=self.left, x2=end, y1=self.py(value), y2=self.py(value), class_="grid"))
            parts.append(tag("text", self.y_format(value), x=self.left - 7, y=self.py(value) + 3.6, class_="tick end"))
        parts.append(tag("line", x1=self.left, x2=end, y1=floor, y2=floor, class_="axis"))
        for value in self.x_ticks:
            parts.append(tag("line", x1=self.px(value), x2=self.px(value), y1=floor, y2=floor + 4, class_="axis"))
            parts.append(tag("text", self.x_format(value), x=self.px(value), y=floor + 16, class_="tick mid"))
        if self.x_label:
            parts.append(tag("text", self.x_label, x=end, y=self.height - 3, class_="tick end label"))
        return Markup("".join(parts))

    def svg(self, *content: Markup, title: str, class_: str = "") -> Markup:
        box = f"0 0 {self.width:g} {self.height:g}"
        return tag(
            "svg", self.axes(), *content, viewBox=box, role="img", aria_label=title, class_=f"plot {class_}".strip()
        )


def line_chart(
    series: Sequence[Series],
    title: str,
    width: float = 760,
    height: float = 260,
    zero: bool = False,
    value_format: Callable[[float], str] = numbers.plain,
    tick_format: Callable[[float], str] | None = None,
    x_label: str = "optimiser step",
) -> Markup:
    """Curves over steps; what is not finite leaves a gap and a mark on the axis, outliers leave the frame at its edge."""
    everything = np.concatenate([one.y for one in series])
    x_all = np.concatenate([one.x for one in series])
    low, high = robust_range(everything, zero)
    pad = (high - low) * 0.05
    y = (low if zero and low == 0 else low - pad, high + pad)
    x = (float(x_all.min()), float(x_all.max()))
    x = x if x[1] > x[0] else (x[0] - 1, x[0] + 1)
    y_ticks = ticks(*y, count=5 if height > 200 else 3)
    tick_format = tick_format or (lambda value: tick_text(value, y_ticks))
    x_ticks = ticks(*x, count=8 if width > 500 else 4, whole=True)
    frame = Frame(width, height, x, y, x_ticks, y_ticks, numbers.quantity, tick_format, x_label)
    drawn = [_curve(frame, one) for one in series]
    return frame.svg(
        *drawn,
        _broken(frame, series),
        _slices(frame, series, value_format),
        title=title,
        class_="wide" if width > 500 else "small",
    )


def tick_text(value: float, all_ticks: Sequence[float]) -> str:
    """A tick with as many decimals as its neighbours need; powers of ten for very small steps."""
    step = abs(all_ticks[1] - all_ticks[0]) if len(all_ticks) > 1 else abs(value) or 1.0
    if value == 0:
        return "0"
    if step < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    if step >= 1:
        return numbers.quantity(value) if abs(value) >= 1000 else f"{value:g}"
    decimals = next(d for d in range(1, 5) if abs(round(step, d) - step) < 1e-9 * step or d == 4)
    return f"{value:.{decimals}f}"


def _curve(frame: Frame, one: Series) -> Markup:
    x, y = thin(one.x, one.y)
    y = np.clip(y, *frame.y)
    if one.look == "dots" or np.isfinite(y).sum() == 1:
        dots = [
            tag("circle", cx=frame.px(a), cy=frame.py(b), r=3.2, class_=f"dot {one.look}")
            for a, b in zip(x, y, strict=True)
            if np.isfinite(b)
        ]
        return Markup("".join(dots))
    path, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if not np.isfinite(b):
            pen = "M"
            continue
        path.append(f"{pen}{frame.px(a):.1f} {frame.py(b):.1f}")
        pen = "L"
    return tag("path", d="".join(path), class_=f"curve {one.look}")


def _broken(frame: Frame, series: Sequence[Series]) -> Markup:
    """Crosses on the axis where a value is not finite."""
    marks = []
    for at in sorted(
        {float(v) for one in series for v in thin(one.x[~np.isfinite(one.y)], one.y[~np.isfinite(one.y)], 60)[0]}
    ):
        x, y = frame.px(at), frame.height - frame.bottom - 6
        d = f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6"
        marks.append(tag("path", tag("title", f"step {at:g}: not a finite number"), d=d, class_="broken"))
    return Markup("".join(marks))


def _slices(frame: Frame, series: Sequence[Series], value_format: Callable[[float], str]) -> Markup:
    """Invisible strips that name the values under the pointer."""
    steps = np.unique(np.concatenate([one.x for one in series]))
    if len(steps) > SLICES:
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, SLICES).astype(int))]
    edges = np.r_[frame.x[0], (steps[1:] + steps[:-1]) / 2, frame.x[1]]
    strips = []
    for step, start, end in zip(steps, edges[:-1], edges[1:], strict=True):
        words, dots = [f"step {step:g}"], []
        for one in series:
            at = np.flatnonzero(one.x == step)
            if len(at):
                value = float(one.y[at[-1]])
                words.append(f"{one.name} {value_format(value)}")
                if np.isfinite(value) and one.look != "dots":
                    dots.append(tag("circle", cx=frame.px(step), cy=frame.py(float(np.clip(value, *frame.y))), r=3))
        area = tag(
            "rect",
            x=frame.px(start),
            y=frame.top,
            width=max(1.0, frame.px(end) - frame.px(start)),
            height=frame.height - frame.bottom - frame.top,
        )
        strips.append(tag("g", tag("title", " · ".join(words)), area, *dots, class_="slice"))
    return Markup("".join(strips))
