"""Rows exactly as they are trained: every token, coloured by its loss weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ftrun.reporting.html import page
from ftrun.reporting.markup import tag
from ftrun.reporting.weights import is_special, legend, level, token_markup
from ftrun.runs.artifacts import write_text

STYLES = ("bright_black", "color(179)", "color(143)", "color(107)", "color(71)", "green")  # by level of the weight


@dataclass(frozen=True)
class PreviewRow:
    """One row. ``tokens`` are decoded one by one, ``weights`` their loss weights; ``note`` says truncated, packed with 4."""

    id: int
    tokens: list[str]
    weights: list[float]
    note: str = ""

    @property
    def trained(self) -> int:
        """Tokens with a weight; the first token of a row is never predicted."""
        return sum(weight > 0 for weight in self.weights[1:])

    @property
    def head(self) -> str:
        words = [f"row {self.id}", f"{len(self.tokens):,} tokens", f"{self.trained:,} trained"]
        return " · ".join([*words, self.note] if self.note else words)


def preview_terminal(
    samples: Sequence[PreviewRow], counts: Mapping[str, Any], title: str, console: Console | None = None
) -> None:
    """Print the rows on standard output. Without colours, trained tokens stand in ⟦ ⟧.

    counts: rows, tokens, trained_tokens of the whole data set, dropped: reason -> rows, perhaps a note.
    """
    console = console or Console(highlight=False)
    console.print(Text(title, "bold"))
    for line in _counted(counts):
        console.print(Text(line))
    coloured = console.color_system is not None and not console.no_color
    top = _top(samples)
    console.print(_legend(top, _shades(samples)) if coloured else Text("⟦trained⟧  not trained", "dim"))
    for row in samples:
        console.print(Text(f"\n{row.head}", "bold"))
        console.print(_coloured(row, top) if coloured else _bracketed(row), soft_wrap=True)


def preview_html(samples: Sequence[PreviewRow], counts: Mapping[str, Any], title: str, path: Path) -> Path:
    """Write the rows as one self-contained page; ``counts`` as for the terminal."""
    top, blocks = _top(samples), []
    for row in samples:
        pairs = zip(row.tokens, row.weights, strict=True)
        tokens = [token_markup(token, weight, f"token {at}", top) for at, (token, weight) in enumerate(pairs)]
        head = tag("div", row.head, class_="muted head")
        blocks.append(tag("div", head, tag("div", *tokens, class_="tokens"), class_="row"))
    lines = [tag("p", line, class_=None if at == 0 else "muted") for at, line in enumerate(_counted(counts))]
    header = tag("header", tag("p", "ftrun preview", class_="kicker"), tag("h1", title), *lines)
    write_text(Path(path), page(f"{title} · preview", header, legend(top, _shades(samples)), *blocks))
    return Path(path)


def _counted(counts: Mapping[str, Any]) -> list[str]:
    tokens, trained = counts["tokens"], counts["trained_tokens"]
    share = f" ({trained / tokens:.1%})" if tokens else ""
    said = [f"{counts['rows']:,} rows, {tokens:,} tokens, {trained:,} of them trained{share}"]
    dropped = counts.get("dropped") or {}
    said += [counts["note"]] if counts.get("note") else []
    return said + [
        f"{count:,} {'row' if count == 1 else 'rows'} dropped: {why}" for why, count in dropped.items() if count
    ]


def _top(samples: Sequence[PreviewRow]) -> float:
    return max([1.0, *(weight for row in samples for weight in row.weights)])


def _shades(samples: Sequence[PreviewRow]) -> bool:
    """Whether there are weights between nothing and the highest."""
    return len({weight for row in samples for weight in row.weights if weight > 0}) > 1


def _legend(top: float, shades: bool) -> Text:
    if not shades:
        return Text("  ").join([Text("not trained", STYLES[0]), Text("trained", STYLES[-1])])
    words = ["not trained", *(f"{top * share:g}" for share in (0.2, 0.4, 0.6, 0.8)), f"weight {top:g}"]
    return Text("  ").join([Text(word, style) for word, style in zip(words, STYLES, strict=True)])


def _coloured(row: PreviewRow, top: float) -> Text:
    made = Text()
    for token, weight in zip(row.tokens, row.weights, strict=True):
        style = STYLES[level(weight, top)]
        made.append(_visible(token), f"{style} reverse" if is_special(token) else style)
    return made


def _bracketed(row: PreviewRow) -> Text:
    """Runs of trained tokens in brackets; a weight other than 1 is written behind."""
    made, current = Text(), 0.0
    for token, weight in [*zip(row.tokens, row.weights, strict=True), ("", 0.0)]:
        if weight != current:
            if current > 0:
                made.append("⟧" if current == 1 else f"⟧{current:.3g}")
            if weight > 0:
                made.append("⟦")
            current = weight
        made.append(_visible(token))
    return made


def _visible(token: str) -> str:
    """White space made visible, and control characters that would steer the terminal."""
    shown = token.replace("\n", "↵\n").replace("\t", "⇥").replace("\r", "␍")
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c != "\n" else "␡" if c == "\x7f" else c for c in shown)
