"""Which tokens a method keeps: by kind of text, place in the answer and turn; the heaviest and the lightest in context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ftrun.data.token_classes import CLASSES, classes_of
from ftrun.reporting.markup import Markup, tag
from ftrun.reporting.plots import Series, line_chart
from ftrun.reporting.run import Run
from ftrun.runs.numbers import plain

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PARTS = 10  # of an answer, from its beginning to its end
EXAMPLES = 10  # heaviest and lightest tokens
CONTEXT = 12  # tokens on either side of an example
TURNS = 6  # answers of a conversation that have a line of their own


def choice_tables(run: Run) -> list[Markup]:
    """Shares kept of the tokens that could be trained; empty where the run's tokens or its tokenizer are not known."""
    columns = run.token_columns
    if run.tokenizer is None or not {"id", "token", "score", "weight"} <= columns.keys():
        return []
    weight = columns["weight"].astype(float)
    asked = np.isfinite(columns["score"].astype(float)) | (weight != 0)
    if not asked.any() or len(np.unique(weight[asked][:100_000])) < 2:
        return []  # all tokens alike: there is no choice to show
    kinds = _kinds(columns["token"], run.tokenizer)
    turn, place = turns_and_places(columns["id"], asked)
    groups = [
        ("kind of token", list(CLASSES), kinds),
        ("place in the answer", [f"{10 * i} to {10 * i + 10}%" for i in range(PARTS)], (place * PARTS).astype(int)),
        ("answer of the conversation", [*(str(i + 1) for i in range(TURNS)), "later"], np.minimum(turn, TURNS)),
    ]
    made = [
        group_table(title, names, group[asked], weight[asked])
        for title, names, group in groups
        if len(np.unique(group[asked])) > 1
    ]
    return [*_by_role(run.token_roles, _graded(weight[asked])), *made, *_examples(columns, asked, run.tokenizer)]


def _by_role(roles: dict[str, dict[str, float]], graded: bool) -> list[Markup]:
    """Shares of all tokens, those that nobody asked to train too; empty where the roles are not known."""
    if not roles:
        return []
    counts, kept, sums = (np.array([one[name] for one in roles.values()]) for name in ("tokens", "kept", "weight"))
    return [_shares("role", list(roles), counts, kept, sums, graded)]


def _kinds(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Index into CLASSES of every token, (tokens,)."""
    special = {number for number, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    return classes_of(tokens, lambda number: tokenizer.decode([number], skip_special_tokens=False), special)


def turns_and_places(ids: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the answer within its row, from 0, and place in it from 0 to below 1, (tokens,) each.

    An answer is a run of tokens that are ``asked``; what lies between them has no meaning here.
    """
    new_row = np.diff(ids, prepend=ids[:1] - 1) != 0
    starts = asked & (new_row | ~np.concatenate([[False], asked[:-1]]))
    span = np.cumsum(starts) - 1  # of all asked tokens, over all rows
    lengths = np.bincount(span[asked], minlength=int(starts.sum()))
    first = np.flatnonzero(starts)
    place = np.zeros(len(ids))
    place[asked] = (np.flatnonzero(asked) - first[span[asked]]) / lengths[span[asked]]
    row = np.cumsum(new_row) - 1
    before = np.full(row[-1] + 1, len(first), np.int64)
    np.minimum.at(before, row[first], np.arange(len(first)))
    return np.where(asked, span - before[row], 0), place


def group_table(title: str, names: Sequence[str], group: np.ndarray, weight: np.ndarray) -> Markup:
    """Tokens, share kept (weight other than 0) with a bar, and mean weight of every group that has tokens."""
    counts = np.bincount(group, minlength=len(names))
    kept = np.bincount(group, weight != 0, minlength=len(names))
    sums = np.bincount(group, weight, minlength=len(names))
    return _shares(title, names, counts, kept, sums, _graded(weight))


def _graded(weight: np.ndarray) -> bool:
    """Whether weights say more than kept or not."""
    return len(np.unique(weight[:100_000])) > 2


def _shares(
    title: str, names: Sequence[str], counts: np.ndarray, kept: np.ndarray, sums: np.ndarray, graded: bool
) -> Markup:
    head = [title, "tokens", "kept", "", *(["mean weight"] if graded else [])]
    lines = []
    for at in np.flatnonzero(counts).tolist():
        share = kept[at] / counts[at]
        cells = [
            tag("td", names[at]),
            tag("td", f"{counts[at]:,.0f}", class_="number"),
            tag("td", f"{share:.1%}", class_="number"),
        ]
        cells.append(tag("td", share_bar(share)))
        if graded:
            cells.append(tag("td", plain(sums[at] / counts[at]), class_="number"))
        lines.append(tag("tr", *cells))
    return tag(
        "table", tag("thead", tag("tr", *(tag("th", word) for word in head))), tag("tbody", *lines), class_="shares"
    )


def share_bar(share: float, width: float = 240, height: float = 12) -> Markup:
    """A share of 1 as a bar in a pale one."""
    whole = tag("rect", x=0, y=0, width=width, height=height, class_="bar all")
    part = tag("rect", x=0, y=0, width=round(width * min(1.0, max(0.0, share)), 1), height=height, class_="bar picked")
    return tag("svg", whole, part, width=width, height=height, role="img", aria_label=f"{share:.1%}")


def _examples(columns: dict[str, np.ndarray], asked: np.ndarray, tokenizer: Tokenizer) -> list[Markup]:
    score, weight = columns["score"].astype(float), columns["weight"].astype(float)
    value = np.where(np.isfinite(score), score, weight)
    at = np.flatnonzero(asked)
    order = at[np.lexsort((-value[at], -weight[at]))]  # by weight; tokens of one weight by their score
    made = []
    for title, chosen in (("Heaviest tokens", order), ("Lightest tokens", order[::-1])):
        lines = [_in_context(columns, int(i), weight[i], score[i], tokenizer) for i in _apart(columns, chosen)]
        made.append(tag("details", tag("summary", title), tag("div", *lines), open=True))
    return made


def _apart(columns: dict[str, np.ndarray], order: np.ndarray) -> list[int]:
    """The first EXAMPLES of ``order``, no token of the vocabulary twice, so that one common word does not fill the list."""
    found: dict[int, int] = {}
    for i in order[: 200 * EXAMPLES].tolist():
        found.setdefault(int(columns["token"][i]), i)
        if len(found) == EXAMPLES:
            break
    return list(found.values())


def _in_context(columns: dict[str, np.ndarray], i: int, weight: float, score: float, tokenizer: Tokenizer) -> Markup:
    ids = columns["id"]
    lo, hi = max(0, i - CONTEXT), min(len(ids), i + CONTEXT + 1)
    near = np.arange(lo, hi)
    near = near[ids[near] == ids[i]]

    def text(of: np.ndarray) -> str:
        return tokenizer.decode(columns["token"][of].tolist(), skip_special_tokens=False).replace("\n", "↵")

    said = [text(near[near < i]), tag("mark", text(near[near == i])), text(near[near > i])]
    known = f" · score {score:.3g}" if np.isfinite(score) else ""
    head = tag("span", f"weight {weight:.3g}{known} · row {ids[i]} ", class_="muted")
    return tag("p", head, *said, class_="quote")


def moved_section(run: Run) -> Markup | None:
    """How a method that weighs inside the step has weighed over the steps; None without one."""
    lines = run.token_weights
    if not lines:
        return None
    steps = np.array([line["step"] for line in lines], float)
    last = lines[-1]
    parts = [
        tag(
            "p",
            tag("strong", f"{last['kept'] / max(1, last['tokens']):.1%} of the trained tokens"),
            f" had a weight in the last step, {plain(last['mean'] or 0)} on average.",
        )
    ]
    if len(lines) > 1:
        kept = np.array([line["kept"] / max(1, line["tokens"]) for line in lines])
        mean = np.array([np.nan if line["mean"] is None else line["mean"] for line in lines])
        parts.append(
            _figure(
                [Series("kept", steps, kept), Series("mean weight", steps, mean, "faint")],
                "Share of tokens with a weight (dark), and the mean weight of all (pale).",
            )
        )
        parts.append(_by_kind(lines))
    parts.append(_parts_table("First and last step, along the answers", lines[0]["parts"], last["parts"]))
    for line in dict.fromkeys((0, len(lines) - 1)):
        parts += _examples_of_step(lines[line])
    return Markup("".join(parts))


def _examples_of_step(line: dict[str, Any]) -> list[Markup]:
    """The heaviest and the lightest tokens of a step in context."""
    made = []
    for title, examples in (("Heaviest", line.get("heaviest", [])), ("Lightest", line.get("lightest", []))):
        quotes = []
        for one in examples:
            before, token, after = (one[name].replace("\n", "↵") for name in ("before", "token", "after"))
            head = tag("span", f"weight {one['factor']:.3g} · row {one['row']} ", class_="muted")
            quotes.append(tag("p", head, before, tag("mark", token), after, class_="quote"))
        if quotes:
            made.append(tag("details", tag("summary", f"{title} tokens of step {line['step']}"), *quotes))
    return made


def _by_kind(lines: list[dict[str, Any]]) -> Markup:
    """A small curve of the mean weight for every kind of token."""
    figures = []
    for name in CLASSES:
        there = [(line["step"], line["classes"][name]["mean"]) for line in lines if name in line["classes"]]
        if len(there) > 1:
            x, y = (np.array(side, float) for side in zip(*there, strict=True))
            chart = line_chart([Series(name, x, y)], f"mean weight of {name} tokens", 370, 150, zero=True)
            figures.append(tag("figure", chart, tag("figcaption", f"mean weight, {name}")))
    return tag("div", *figures, class_="small-multiples")


def _parts_table(title: str, first: list[dict[str, float]], last: list[dict[str, float]]) -> Markup:
    head = tag("tr", *(tag("th", word) for word in (title, "mean weight, first step", "", "last step", "")))
    top = max([1e-9, *(abs(one["mean"]) for one in (*first, *last) if one["mean"] is not None)])
    rows = []
    for i, (before, after) in enumerate(zip(first, last, strict=True)):
        cells = [tag("td", f"{100 * i // len(first)} to {100 * (i + 1) // len(first)}%")]
        for one in (before, after):
            mean = one["mean"]
            cells += [tag("td", "" if mean is None else plain(mean), class_="number")]
            cells += [tag("td", "" if mean is None else share_bar(mean / top, 120))]
        rows.append(tag("tr", *cells))
    return tag("table", tag("thead", head), tag("tbody", *rows), class_="shares both")


def _figure(series: list[Series], caption: str) -> Markup:
    return tag("figure", line_chart(series, caption, height=220, zero=True), tag("figcaption", caption))
