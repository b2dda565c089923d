"""The selection section of the report: what was picked, what was left, and why."""

from __future__ import annotations

from typing import Any

import numpy as np

from ftrun.reporting.histograms import compared, histogram
from ftrun.reporting.markup import Markup, clipped, tag
from ftrun.reporting.rows import prompt_and_response
from ftrun.reporting.run import Run
from ftrun.runs import numbers
from ftrun.select.audit import example_rows

REASONS = 3  # why rows have no score
KEYS = ("id", "selected", "rank", "source", "duplicate_of")


def selection_section(run: Run) -> Markup | None:
    """Score histogram, lengths, and rows to read; None when nothing was selected."""
    scores = run.scores
    if "id" not in scores or "selected" not in scores or not len(scores["id"]):
        return None
    picked = scores["selected"].astype(bool)
    column = score_column(run)
    parts: list[Markup | None] = [_headline(run, picked)]
    if column:
        values = scores[column].astype(float)
        caption = [
            tag("i", column.replace("_", " ")),
            " of every row of the pool; picked rows stand out. The outermost bars hold what lies beyond them.",
        ]
        if np.isfinite(values).any():
            parts.append(figure(histogram(values, picked, f"histogram of {column}", column.replace("_", " ")), caption))
    parts += [length_figure(run, picked), other_columns(scores, picked, column)]
    if column:
        parts += _examples(run, column)
    return Markup("".join(part for part in parts if part))


def score_column(run: Run) -> str | None:
    """The column that rows were ranked by: what the stage says, else the method's name, else the first score."""
    columns = [name for name, values in run.scores.items() if name not in KEYS and values.dtype.kind == "f"]
    said = run.selection.get("column")
    method = run.config.get("select")
    name = method.get("name") if isinstance(method, dict) else method
    return next((wish for wish in (said, name, "score") if wish in columns), columns[0] if columns else None)


def _headline(run: Run, picked: np.ndarray) -> Markup:
    count, total = int(picked.sum()), len(picked)
    words = [tag("strong", f"{count:,} of {total:,} rows"), f" were picked ({count / total:.1%})"]
    lengths = run.row_lengths
    if lengths is not None and np.nansum(lengths) > 0:
        tokens = float(np.nansum(lengths[picked]))
        words.append(
            f", {numbers.quantity(tokens)} of {numbers.quantity(float(np.nansum(lengths)))} tokens ({tokens / np.nansum(lengths):.1%})"
        )
    words.append(".")
    unscored = run.selection.get("unscored")
    dropped, reasons = (unscored.get("rows"), _reasons(unscored)) if isinstance(unscored, dict) else (unscored, "")
    filtered = run.selection.get("filtered")
    if isinstance(dropped, int) and dropped:
        words.append(f" {dropped:,} could not be scored{reasons}.")
    if isinstance(filtered, int) and filtered:
        was = "was" if filtered == 1 else "were"
        words.append(f" {filtered:,} {was} left out by the method's filter.")
    return tag("p", *words)


def _reasons(unscored: dict[str, Any]) -> str:
    """Why rows have no score, the most common reasons first."""
    reasons = unscored.get("reasons")
    if not isinstance(reasons, dict) or not reasons:
        return ""
    counts = {why: found.get("rows", 0) if isinstance(found, dict) else 0 for why, found in reasons.items()}
    ordered = sorted(counts, key=lambda why: -counts[why])[:REASONS]
    return ": " + "; ".join(f"{why} ({counts[why]:,})" if len(counts) > 1 else why for why in ordered)


def length_figure(run: Run, picked: np.ndarray) -> Markup | None:
    """Tokens of the choice against the pool; None where nothing would be seen that the scores do not show."""
    lengths = run.row_lengths
    column = score_column(run)
    if lengths is None or not np.isfinite(lengths[picked]).any():
        return None
    if column and np.array_equal(run.scores[column], lengths, equal_nan=True):
        return None  # the score is the length: its histogram shows this already
    medians = np.nanmedian(lengths), np.nanmedian(lengths[picked])
    caption = f"Tokens of a row: the choice filled (median {medians[1]:.0f}), the whole pool as a line (median {medians[0]:.0f})."
    return figure(compared(lengths, lengths[picked], "row lengths", "tokens"), [caption])


def other_columns(scores: dict[str, np.ndarray], picked: np.ndarray, column: str | None) -> Markup | None:
    """Small histograms of every score but ``column``."""
    names = [name for name, values in scores.items() if name not in (column, *KEYS) and values.dtype.kind == "f"]
    plots = []
    for name in names:
        values = scores[name].astype(float)
        if np.isfinite(values).any():
            label = name.replace("_", " ")
            plots.append(figure(histogram(values, picked, f"histogram of {label}", "", width=370, height=140), [label]))
    return tag("div", *plots, class_="small-multiples") if plots else None


def _examples(run: Run, column: str) -> list[Markup]:
    scores = run.scores
    rank = scores["rank"].astype(float) if "rank" in scores else None
    groups = example_rows(scores["selected"].astype(bool), scores[column].astype(float), rank)
    filled = [(heading, rows) for heading, rows in groups.items() if len(rows)]
    return [rows_group(run, heading, rows, column, at == 0) for at, (heading, rows) in enumerate(filled)]


def rows_group(
    run: Run,
    title: str,
    positions: np.ndarray,
    column: str | None,
    opened: bool,
    total: int | None = None,
    below: Markup | None = None,
) -> Markup:
    """Rows to read, foldable, their scores at the side. ``positions``: places in scores.parquet.

    ``total``: how many there are, if not all are shown; ``below``: what is said of the others.
    """
    body = []
    lengths = run.row_lengths
    texts = run.rows([int(run.scores["id"][at]) for at in positions])
    for at in positions:
        identity = int(run.scores["id"][at])
        picked = bool(run.scores["selected"][at])
        row = texts.get(identity)
        words: list[Markup]
        if row is None:
            words = [tag("span", "The text of this row was not kept in the run folder.", class_="muted")]
        else:
            prompt, response = prompt_and_response(row)
            words = [
                tag("div", clipped(prompt), class_="asked"),
                tag("div", clipped(response), class_="answered") if response else Markup(""),
            ]
        mark = tag("span", "picked" if picked else "left", class_=f"mark {'picked' if picked else 'left'}")
        score = float(run.scores[column][at]) if column else float("nan")
        number = tag("div", numbers.plain(score), class_="score") if np.isfinite(score) else None
        side = [number, tag("div", mark, f" row {identity}", class_="muted")]
        if lengths is not None and np.isfinite(lengths[at]):
            side.append(tag("div", f"{lengths[at]:,.0f} tokens", class_="muted"))
        body.append(tag("li", tag("div", *side, class_="side"), tag("div", *words, class_="words")))
    return tag(
        "details",
        tag("summary", title, tag("span", f" {len(positions) if total is None else total:,} rows", class_="muted")),
        tag("ol", *body, class_="rows") if body else None,
        below,
        open=opened,
        class_="group",
    )


def figure(plot: Markup, caption: list[Markup | str]) -> Markup:
    """A plot with its caption."""
    return tag("figure", plot, tag("figcaption", *caption))
