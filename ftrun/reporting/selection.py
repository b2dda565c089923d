"""selection/report.html: what one or several methods chose from a pool, on one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ftrun.reporting.choice import figure, length_figure, other_columns, rows_group
from ftrun.reporting.histograms import histogram
from ftrun.reporting.html import breakable, page, paper_line, path_text
from ftrun.reporting.markup import Markup, tag
from ftrun.reporting.run import Run
from ftrun.reporting.selection_facts import Choice, jaccard, jaccard_by_chance, read_choices, spearman
from ftrun.reporting.shares import BESIDE, pair_table, share_chart
from ftrun.runs import numbers
from ftrun.runs.artifacts import write_text
from ftrun.select.audit import AUDITED, example_rows

NAMED = 200  # ids of rows without a score that are written out


def write_selection_report(out: Path) -> Path | None:
    """Write selection/report.html into a run folder; None when nothing was selected there."""
    choices = [choice for choice in read_choices(Path(out)) if {"id", "selected"} <= choice.run.scores.keys()]
    if not choices:
        return None
    path = Path(out) / "selection" / "report.html"
    write_text(path, render_selection(choices, Run(Path(out))))
    return path


def render_selection(choices: Sequence[Choice], run: Run) -> str:
    """The page as text. ``run``: the run as a whole."""
    several = len(choices) > 1
    title = "Selections compared" if several else choices[0].name
    body: list[Markup | None] = [_header(choices, run, title), _section("At a glance", _glance(choices))]
    if several:
        body.append(_section("Overlap", _overlap(choices)))
    for choice in choices:
        parts = [(name, made) for name, made in ((name, part(choice)) for name, part in PARTS.items()) if made]
        if several:
            inside = [Markup(tag("h3", name) + made) for name, made in parts]
            body.append(tag("section", tag("h2", choice.name), paper_line(choice.run), *inside))
        else:
            body += [_section(name, made) for name, made in parts]
    unreadable = [f"{choice.name}: {name}" for choice in choices for name in choice.run.unreadable]
    if unreadable:
        body.append(_section("Not readable, left out here", tag("ul", *(tag("li", line) for line in unreadable))))
    body.append(tag("footer", f"Made by ftrun from the files in {run.path.name}/selection/ alone."))
    return page(f"{', '.join(choice.name for choice in choices)} · selection", *body)


def _section(title: str, content: Markup | None) -> Markup | None:
    return tag("section", tag("h2", title), content) if content else None


def _header(choices: Sequence[Choice], run: Run, title: str) -> Markup:
    first = choices[0]
    facts = [
        ("pool", f"{len(first.ids):,} rows, {numbers.quantity(float(np.nansum(first.tokens)))} tokens"),
        ("data", path_text(first.run.config.get("data"))),
        ("model that scores", _scoring_model(first.run)),
        ("budget", _same([choice.run.selection.get("budget") for choice in choices])),
        ("seed", _same([choice.run.config.get("seed") for choice in choices])),
    ]
    items = [tag("div", tag("dt", name), tag("dd", breakable(text))) for name, text in facts if text]
    names = tag("p", ", ".join(choice.name for choice in choices), class_="paper") if len(choices) > 1 else None
    about = names or paper_line(first.run)
    return tag(
        "header",
        tag("p", "ftrun selection", class_="kicker"),
        tag("h1", title),
        about,
        tag("dl", *items, class_="facts"),
    )


def _scoring_model(run: Run) -> str:
    method = run.config.get("select")
    named = (method.get("model") or {}).get("path") if isinstance(method, dict) else None
    return str(named or path_text(run.config.get("model")))


def _same(values: list[object]) -> str:
    said = [str(value) for value in values if value is not None]
    return said[0] if said and len(set(said)) == 1 else ", ".join(said)


# ---- all methods ----


def _glance(choices: Sequence[Choice]) -> Markup:
    """A line for the pool and each choice, a random choice of as many tokens in small type below each number."""
    first = choices[0]
    everything = np.ones(len(first.ids), bool)
    head = ["", "rows", "tokens", "median length", "clusters reached", "no score", "left out by filters"]
    rows = [_line("the whole pool", first, everything, None, ["", ""])]
    for choice in choices:
        unscored = sum(len(rows) for rows in choice.unscored().values())
        filtered = int((choice.run.selection.get("filtered") or 0) + np.isfinite(choice.repeats).sum())
        rows.append(_line(choice.name, choice, choice.picked, choice.random, [f"{unscored:,}", f"{filtered:,}"]))
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
        tag("tbody", *rows),
        class_="numbers",
    )
    note = "Below each number in small type: rows drawn at random until they have as many tokens as the choice."
    return Markup(tag("div", table, class_="scroll") + tag("p", note, class_="note"))


def _median(choice: Choice, rows: np.ndarray) -> str:
    """Median length of these rows; a dash where there are none: the first row drawn at random may be too long."""
    known = choice.tokens[rows & np.isfinite(choice.tokens)]
    return f"{np.median(known):,.0f}" if len(known) else "–"


def _line(name: str, choice: Choice, rows: np.ndarray, random: np.ndarray | None, further: list[str]) -> Markup:
    clusters = len(choice.cluster_names)
    measures: list[Callable[[np.ndarray], str]] = [
        lambda mask: f"{int(mask.sum()):,}",
        lambda mask: numbers.quantity(float(np.nansum(choice.tokens[mask]))),
        lambda mask: _median(choice, mask),
        lambda mask: f"{len(np.unique(choice.cluster[mask & choice.sampled]))} of {clusters}",
    ]
    cells = []
    for measure in measures:
        beside = tag("span", f"random {measure(random)}", class_="of") if random is not None else None
        cells.append(tag("td", tag("span", measure(rows), class_="value"), beside))
    cells += [tag("td", tag("span", text, class_="value")) for text in further]
    return tag("tr", tag("th", name, scope="row"), *cells)


def _overlap(choices: Sequence[Choice]) -> Markup:
    names = [choice.name for choice in choices]
    sizes = [int(choice.picked.sum()) for choice in choices]
    shared = np.array([[jaccard(one.picked, other.picked) for other in choices] for one in choices])
    agree = np.array([[spearman(one.score, other.score) for other in choices] for one in choices])

    def both(i: int, j: int) -> str:
        count = int((choices[i].picked & choices[j].picked).sum())
        chance = jaccard_by_chance(sizes[i], sizes[j], len(choices[i].ids))
        return f"{names[i]} and {names[j]}: {count:,} rows in common; two random choices of these sizes: {chance:.2f}"

    tables = [
        pair_table(names, shared, "Rows in common (Jaccard index)", both),
        pair_table(
            names,
            agree,
            "Agreement of the scores (Spearman's rank correlation)",
            lambda i, j: f"{names[i]} and {names[j]}",
        ),
    ]
    expected = jaccard_by_chance(max(sizes), max(sizes), len(choices[0].ids))
    note = (
        "Jaccard: rows that both chose, of those that either chose. "
        f"Two random choices of {max(sizes):,} rows come to {expected:.2f} on average."
    )
    return Markup(tag("div", *tables, class_="beside" if len(names) <= BESIDE else "") + tag("p", note, class_="note"))


# ---- one method ----


def _scores(choice: Choice) -> Markup | None:
    parts: list[Markup | None] = []
    if choice.column and np.isfinite(choice.score).any():
        label = choice.column.replace("_", " ")
        cut = f" The lowest score that was picked is {numbers.plain(choice.cutoff)}." if choice.picked.any() else ""
        if not choice.follows_score:
            cut += " Rows with a higher score were left out: the picker looks at more than the score."
        words = [
            tag("i", label),
            " of every row; picked rows are dark. The outermost bars hold what lies beyond." + cut,
        ]
        parts.append(figure(histogram(choice.score, choice.picked, f"histogram of {label}", label), words))
    parts.append(other_columns(choice.run.scores, choice.picked, choice.column))
    return Markup("".join(part for part in parts if part)) or None


def _lengths(choice: Choice) -> Markup | None:
    known = np.isfinite(choice.tokens)
    if not known[choice.picked].any():
        return None
    middle = [_median(choice, mask) for mask in (choice.picked, known, choice.random)]
    words = [
        tag("strong", f"The median row of the choice has {middle[0]} tokens"),
        f", of the pool {middle[1]}, of a random choice {middle[2]}.",
    ]
    tied = spearman(choice.score, choice.tokens)
    if np.isfinite(tied):
        words.append(f" Rank correlation of score and length: {tied:.2f}.".replace("-", "−"))
    return Markup(tag("p", *words) + (length_figure(choice.run, choice.picked) or ""))


def _sources(choice: Choice) -> Markup | None:
    groups = choice.by_source()
    return figure(share_chart(groups, "shares of the sources"), [LEGEND]) if groups else None


def _clusters(choice: Choice) -> Markup | None:
    groups = choice.by_cluster()
    if len(groups) < 2:
        return None
    read = int(choice.sampled.sum())
    of = "the pool" if read == len(choice.ids) else f"a sample of {read:,} rows of the pool"
    words = f"Clusters of {of} by k-means over the {choice.clustered_by}, named by their most telling words. "
    return figure(share_chart(groups, "shares of the clusters"), [words, LEGEND])


LEGEND = (
    "Pale: share of the pool's rows; dark: of the choice; stroke: of a random choice of as many tokens. "
    "On the right, choice over pool."
)


def _read(choice: Choice) -> Markup | None:
    if not choice.column:
        first = np.argsort(choice.rank, kind="stable")[: min(AUDITED, int(choice.picked.sum()))]
        return rows_group(choice.run, "First of the choice", first, None, False)
    groups = example_rows(choice.picked, choice.score, choice.rank, AUDITED, once=False)
    made = [rows_group(choice.run, name, rows, choice.column, False) for name, rows in groups.items() if len(rows)]
    return Markup("".join(made)) or None


def _unscored(choice: Choice) -> Markup | None:
    parts = []
    for reason, rows in choice.unscored().items():
        kept = choice.run.rows([int(choice.ids[at]) for at in rows])
        shown = np.array([at for at in rows.tolist() if int(choice.ids[at]) in kept][:AUDITED], np.int64)
        others = [int(choice.ids[at]) for at in rows.tolist() if at not in set(shown.tolist())]
        more = f" and {len(others) - NAMED:,} more" if len(others) > NAMED else ""
        text = f"{'also ' if len(shown) else ''}rows {', '.join(map(str, others[:NAMED]))}{more}"
        listed = tag("p", text, class_="note") if others else None
        parts.append(rows_group(choice.run, reason, shown, choice.column, False, len(rows), listed))
    return Markup("".join(parts)) or None


PARTS: dict[str, Callable[[Choice], Markup | None]] = {
    "Scores": _scores,
    "Length": _lengths,
    "Sources": _sources,
    "Topics": _clusters,
    "Rows to read": _read,
    "Rows without a score": _unscored,
}
