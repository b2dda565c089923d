"""Groups of the pool and how much of each was chosen, and pairs of methods as a shaded table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ftrun.reporting.markup import Markup, tag
from ftrun.reporting.plots import tick_text, ticks

LINE = 25  # pixels of one group
LABEL = 34  # characters of a label that fit
BESIDE = 4  # names in the head of a table that still leave room for another beside it


@dataclass(frozen=True)
class Share:
    """One group: its part of the pool, of the choice and of a random choice, each in [0, 1]."""

    name: str
    pool: float
    choice: float
    random: float


def shares_of(names: Sequence[str], group: np.ndarray, picked: np.ndarray, random: np.ndarray) -> list[Share]:
    """The parts of all groups. ``group``: (rows,) number of a name; ``picked``, ``random``: (rows,) bool."""
    counted = [np.bincount(group[mask], minlength=len(names)) for mask in (np.ones(len(group), bool), picked, random)]
    pool, choice, chance = (counts / max(1, counts.sum()) for counts in counted)
    return [Share(name, float(pool[i]), float(choice[i]), float(chance[i])) for i, name in enumerate(names)]


def share_chart(groups: Sequence[Share], title: str, width: float = 760) -> Markup:
    """A line a group: the pool as a wide pale bar, the choice as a dark one in it, a random choice as a stroke."""
    left, right, top = 236.0, 54.0, 8.0
    height = top + LINE * len(groups) + 26
    highest = max([0.01, *(max(one.pool, one.choice, one.random) for one in groups)])
    marks = ticks(0, 100 * highest, count=6)

    def px(value: float) -> float:
        return left + value / highest * (width - left - right)

    parts = []
    for mark in marks:
        parts.append(tag("line", x1=px(mark / 100), x2=px(mark / 100), y1=top, y2=height - 22, class_="grid"))
        words = f"{tick_text(mark, marks)}%"
        parts.append(tag("text", words, x=px(mark / 100), y=height - 6, class_="tick mid"))
    for at, one in enumerate(groups):
        y = top + at * LINE
        words = (
            f"{one.name}: {one.pool:.1%} of the pool, {one.choice:.1%} of the choice, {one.random:.1%} of a random one"
        )
        name = one.name if len(one.name) <= LABEL else one.name[: LABEL - 1] + "…"
        bars = [
            tag("title", words),
            tag("rect", x=0, y=y, width=width, height=LINE, class_="area"),
            tag("rect", x=left, y=y + 4, width=px(one.pool) - left, height=LINE - 8, class_="bar all"),
            tag("rect", x=left, y=y + 8.5, width=px(one.choice) - left, height=LINE - 17, class_="bar picked"),
            tag("line", x1=px(one.random), x2=px(one.random), y1=y + 3, y2=y + LINE - 3, class_="chance"),
            tag("text", name, x=left - 10, y=y + LINE / 2 + 4, class_="tick end name"),
            tag("text", _times(one), x=width, y=y + LINE / 2 + 4, class_="tick end"),
        ]
        parts.append(tag("g", *bars, class_="bin"))
    return tag("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=title, class_="plot wide")


def _times(one: Share) -> str:
    if not one.pool:
        return ""
    if not one.choice:
        return "none"
    times = one.choice / one.pool
    return f"×{times:.1f}" if times < 99.5 else f"×{times:.0f}"


def pair_table(
    names: Sequence[str], values: np.ndarray, title: str, hint: Callable[[int, int], str], decimals: int = 2
) -> Markup:
    """A square table of values in [-1, 1], shaded by size; the diagonal stays empty. Many columns go by number."""
    many = len(names) > BESIDE
    numbers = [tag("th", "")]
    numbers += [tag("th", str(at) if many else name, scope="col", title=name) for at, name in enumerate(names, 1)]
    body = []
    for row, name in enumerate(names):
        cells = [tag("th", f"{row + 1} {name}" if many else name, scope="row")]
        for column in range(len(names)):
            value = float(values[row, column])
            if row == column or not np.isfinite(value):
                cells.append(tag("td", "–" if row != column else "", class_="none"))
                continue
            side = "held" if value < 0 else "accent"
            shade = f"background: color-mix(in srgb, var(--{side}) {round(55 * min(1.0, abs(value)))}%, transparent)"
            text = f"{value:.{decimals}f}".replace("-", "−")
            cells.append(tag("td", text, style=shade, title=hint(row, column)))
        body.append(tag("tr", *cells))
    table = tag("table", tag("thead", tag("tr", *numbers)), tag("tbody", *body), class_="pairs")
    return tag("figure", tag("figcaption", title), tag("div", table, class_="scroll"))
