"""The selection section of the report: what was picked, what was left, and why."""

from __future__ import annotations

import numpy as np

from ftrun.reporting import numbers
from ftrun.reporting.histograms import compared, histogram
from ftrun.reporting.markup import Markup, clipped, tag
from ftrun.reporting.rows import prompt_and_response
from ftrun.reporting.run import Run

EACH = 10  # rows shown of the best, of those around the cut, and of the worst
LENGTHS = ("length", "lengths", "tokens", "n_tokens")
KEYS = ("id", "selected", "rank", "source")


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
        missing = int((~np.isfinite(values)).sum())
        caption = [
            tag("i", column.replace("_", " ")),
            " of every row of the pool; picked rows are shaded. The outermost bars hold what lies beyond them.",
        ]
        if missing:
            caption.append(f" {missing:,} {'row has' if missing == 1 else 'rows have'} no score.")
        if np.isfinite(values).any():
            parts.append(
                _figure(histogram(values, picked, f"histogram of {column}", column.replace("_", " ")), caption)
            )
    parts += [_lengths(scores, picked), _other_columns(scores, picked, column)]
    if column:
        parts += _examples(run, column)
    return Markup("".join(part for part in parts if part))


def score_column(run: Run) -> str | None:
    """The column that rows were ranked by: what the stage says, else the method's name, else the first score."""
    columns = [name for name, values in run.scores.items() if name not in KEYS + LENGTHS and values.dtype.kind == "f"]
    said = run.selection.get("column")
    method = run.config.get("select")
    name = method.get("name") if isinstance(method, dict) else method
    return next((wish for wish in (said, name, "score") if wish in columns), columns[0] if columns else None)


def example_ids(selected: np.ndarray, ranked_by: np.ndarray) -> dict[str, np.ndarray]:
    """Positions worth reading, by group: highest scores, both sides of the cut, lowest scores.

    ``selected`` (rows,) bool, ``ranked_by`` (rows,) float, higher is better, NaN is left out.
    """
    order = np.argsort(-ranked_by, kind="stable")
    order = order[np.isfinite(ranked_by[order])]
    inside, outside = order[selected[order]], order[~selected[order]]
    best, worst = order[:EACH], order[EACH:][-EACH:]
    cut = np.concatenate([inside[-EACH // 2 :], outside[: EACH // 2]]) if len(outside) and len(inside) else order[:0]
    shown = set(best) | set(worst)
    return {"best": best, "cut": np.array([row for row in cut if row not in shown], dtype=int), "worst": worst}


def _headline(run: Run, picked: np.ndarray) -> Markup:
    count, total = int(picked.sum()), len(picked)
    words = [tag("strong", f"{count:,} of {total:,} rows"), f" were picked ({count / total:.1%})"]
    lengths = next((run.scores[name].astype(float) for name in LENGTHS if name in run.scores), None)
    if lengths is not None and np.nansum(lengths) > 0:
        tokens = float(np.nansum(lengths[picked]))
        words.append(
            f", {numbers.quantity(tokens)} of {numbers.quantity(float(np.nansum(lengths)))} tokens ({tokens / np.nansum(lengths):.1%})"
        )
    seconds = run.selection.get("wall_s")
    if isinstance(seconds, int | float):
        words.append(f", in {numbers.duration(seconds)}")
    return tag("p", *words, ".")


def _lengths(scores: dict[str, np.ndarray], picked: np.ndarray) -> Markup | None:
    name = next((name for name in LENGTHS if name in scores), None)
    if name is None or not picked.any():
        return None
    lengths = scores[name].astype(float)
    medians = np.nanmedian(lengths), np.nanmedian(lengths[picked])
    caption = f"Tokens of a row: the choice filled (median {medians[1]:.0f}), the whole pool as a line (median {medians[0]:.0f})."
    return _figure(compared(lengths, lengths[picked], "row lengths", "tokens"), [caption])


def _other_columns(scores: dict[str, np.ndarray], picked: np.ndarray, column: str | None) -> Markup | None:
    names = [
        name for name, values in scores.items() if name not in (column, *KEYS, *LENGTHS) and values.dtype.kind == "f"
    ]
    plots = []
    for name in names:
        values = scores[name].astype(float)
        if np.isfinite(values).any():
            label = name.replace("_", " ")
            plots.append(
                _figure(histogram(values, picked, f"histogram of {label}", "", width=370, height=140), [label])
            )
    return tag("div", *plots, class_="small-multiples") if plots else None


def _examples(run: Run, column: str) -> list[Markup]:
    scores = run.scores
    values, picked = scores[column].astype(float), scores["selected"].astype(bool)
    finite = np.isfinite(values)
    clean = bool(
        picked.any() and (~picked & finite).any() and values[picked & finite].min() >= values[~picked & finite].max()
    )
    groups = example_ids(picked, values)
    titles = {
        "best": "Highest scores",
        "cut": "Around the cut" if clean else "Lowest scores that were picked, highest that were not",
        "worst": "Lowest scores",
    }
    return [_rows(run, titles[group], rows, column, group == "best") for group, rows in groups.items() if len(rows)]


def _rows(run: Run, title: str, positions: np.ndarray, column: str, opened: bool) -> Markup:
    body = []
    for at in positions:
        identity = int(run.scores["id"][at])
        picked = bool(run.scores["selected"][at])
        row = run.rows.get(identity)
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
        number = tag("div", numbers.plain(float(run.scores[column][at])), class_="score")
        side = [number, mark, tag("div", f"row {identity}", class_="muted")]
        body.append(tag("li", tag("div", *side, class_="side"), tag("div", *words, class_="words")))
    return tag(
        "details",
        tag("summary", title, tag("span", f" {len(positions)} rows", class_="muted")),
        tag("ol", *body, class_="rows"),
        open=opened,
        class_="group",
    )


def _figure(plot: Markup, caption: list[Markup | str]) -> Markup:
    return tag("figure", plot, tag("figcaption", *caption))
