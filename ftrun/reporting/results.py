"""The result sections of the report: what changed, and predictions to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ftrun.evaluation.base import higher_is_better
from ftrun.reporting.changes import Change, Measured, number
from ftrun.reporting.gain import gain
from ftrun.reporting.histograms import interval, scatter
from ftrun.reporting.markup import Markup, clipped, tag, template_markers
from ftrun.reporting.run import Run
from ftrun.runs import numbers

SHOWN = 8  # predictions of each evaluator
ARROWS = {"better": "good", "worse": "bad", "within noise": "muted", "changed": "", "same": "muted", "": "muted"}

# names under which evaluators keep the parts of a prediction
ASKED = ("prompt", "question", "input", "text")
WANTED = ("gold", "answer", "target", "reference", "label", "expected")
GIVEN = ("prediction", "output", "response", "completion", "generated", "predicted")
NUMBERS = ("loss", "nll", "score", "correct")  # of a row without text
SCORED = ("correct", "score", "exact_match", "nll", "loss")


def key_numbers(run: Run) -> Markup | None:
    """Before, after and change of every metric."""
    found = run.changes
    if not found:
        return None
    compared = any(change.before and change.after for change in found)
    heads = ["", "before", "after", "change", ""] if compared else ["", "value"]
    rows = [_change_row(change, compared) for change in found]
    head = tag("tr", *(tag("th", words, scope="col") for words in heads))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="numbers")
    note = (
        "± is one standard error. A change below about two of its own standard errors is called noise; "
        "it is taken over the differences of single rows where both sides list them. In the small plots the ring is before, the dot after, the lines reach two standard errors."
    )
    said = gain(run)
    parts = [
        tag("p", said) if said else "",
        tag("div", table, class_="scroll"),
        tag("p", note, class_="note") if compared else "",
    ]
    return Markup("".join(parts))


def _change_row(change: Change, compared: bool) -> Markup:
    side = change.after or change.before
    rows = f" · n = {side.n:,}" if side and side.n else ""
    name = tag(
        "th", change.metric.replace("_", " "), tag("span", f"{change.evaluator}{rows}", class_="of"), scope="row"
    )
    if not compared:
        return tag("tr", name, tag("td", _value(side)))
    cells = [tag("td", _value(change.before), class_="past"), tag("td", _value(change.after), class_="now")]
    return tag(
        "tr", name, *cells, tag("td", _delta(change), class_="change"), tag("td", interval(change), class_="picture")
    )


def _value(side: Measured | None) -> Markup:
    if side is None:
        return tag("span", "–", class_="muted")
    value, error = numbers.pair(side.value, side.stderr)
    return Markup(tag("span", value, class_="value") + (tag("span", f" ± {error}", class_="error") if error else ""))


def _delta(change: Change) -> Markup:
    if change.delta is None:
        return Markup("")
    sign = ("", "▲ +", "▼ −")[change.direction]
    words = [
        tag("span", f"{sign}{change.amount}", class_="value"),
        tag("span", change.verdict, class_="verdict"),
    ]
    return tag("span", *words, class_=ARROWS[change.verdict] or None)


def predictions_section(run: Run) -> Markup | None:
    """A few rows of every evaluator, those that changed first."""
    before = run.earlier
    parts = []
    for evaluator, rows in run.predictions().items():
        earlier = before.get(evaluator, [])
        if rows and _first(rows[0], (*ASKED, *WANTED, *GIVEN)) is not None:
            parts.append(_evaluator(evaluator, rows, earlier))
        else:
            parts.append(_row_by_row(evaluator, rows, earlier))
    return Markup("".join(part for part in parts if part)) or None


def _evaluator(name: str, rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> Markup:
    earlier = _by_id(before)
    pairs = [(row, earlier.get(identity)) for identity, row in _by_id(rows).items()]
    tally = _tally(pairs)
    pairs.sort(key=lambda pair: _interest(*pair))  # stable: else in the evaluator's order
    # one of each kind in turn, so that not only successes are shown
    kinds: dict[int, list[tuple[dict[str, Any], dict[str, Any] | None]]] = {}
    for pair in pairs:
        kinds.setdefault(_interest(*pair), []).append(pair)
    shown = []
    while len(shown) < SHOWN and any(kinds.values()):
        shown += [group.pop(0) for group in kinds.values() if group]
    cards = [_prediction(row, old) for row, old in shown[:SHOWN]]
    title = [
        name.replace("_", " "),
        tag("span", f" {min(SHOWN, len(shown))} of {len(rows):,} rows{tally}", class_="muted"),
    ]
    return tag("details", tag("summary", *title), tag("div", *cards, class_="cards"), open=True, class_="group")


def _row_by_row(name: str, rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> Markup | None:
    """Numbers of every row before and after, for evaluators that predict no text."""
    earlier = _by_id(before)
    key = next((key for key in NUMBERS if rows and any(key in row for row in rows)), None)
    pairs = [
        (number(earlier[i].get(key)), number(row.get(key))) for i, row in _by_id(rows).items() if key and i in earlier
    ]
    values = np.array(pairs, dtype=float).reshape(-1, 2)
    values = values[np.isfinite(values).all(axis=1)]
    if len(values) < 3:
        return None
    rise = values[:, 1] - values[:, 0]
    improved = int((rise > 0).sum() if higher_is_better(key or "") else (rise < 0).sum())
    caption = f"{name.replace('_', ' ')}: {key} of every row, before training against after it. {improved:,} of {len(values):,} rows got better; below the diagonal the value fell."
    return tag(
        "figure",
        scatter(values[:, 0], values[:, 1], f"{key} of every row before and after", "before", "after"),
        tag("figcaption", caption),
        class_="square",
    )


def _by_id(rows: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    return {str(row.get("id", index)): row for index, row in enumerate(rows)}


def _right(row: Mapping[str, Any] | None) -> bool | None:
    """Whether an answer is right; None where rows have numbers only, or a score between."""
    if row is None or (_first(row, GIVEN) is None and _first(row, WANTED) is None):
        return None
    for key in ("correct", "exact_match", "score"):
        value = row.get(key)
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
    return None


def _interest(row: dict[str, Any], old: dict[str, Any] | None) -> int:
    """0 mended, 1 broken, 2 wrong both times, 3 right both times, 4 cannot be told."""
    was, now = _right(old), _right(row)
    if now is None:
        return 4
    return {(False, True): 0, (True, False): 1}.get((was, now), 3 if now else 2)  # type: ignore[arg-type]


def _tally(pairs: list[tuple[dict[str, Any], dict[str, Any] | None]]) -> str:
    kinds = [_interest(*pair) for pair in pairs if pair[1] is not None]
    mended, broken = kinds.count(0), kinds.count(1)
    return f" · {mended} became right, {broken} became wrong" if mended or broken else ""


def _prediction(row: dict[str, Any], old: dict[str, Any] | None) -> Markup:
    parts = []
    asked, wanted = _first(row, ASKED), _first(row, WANTED)
    if asked is not None:
        parts.append(tag("div", clipped(_words(asked), 320, template_markers), class_="asked"))
    said = _first(row, GIVEN)
    same = old is not None and said is not None and said == _first(old, GIVEN) and _right(old) == _right(row)
    if old is not None and not same:
        parts.append(_given("before", old))
    parts.append(_given("unchanged" if same else "after" if old is not None else "answer", row))
    if wanted is not None:
        parts.append(
            tag(
                "div",
                tag("span", "wanted", class_="who"),
                tag("div", clipped(_words(wanted)), class_="said"),
                class_="reply",
            )
        )
    parts.append(tag("div", _details(row), class_="rest"))
    return tag("article", *parts, class_="card")


def _details(row: Mapping[str, Any]) -> str:
    """How an answer was checked, where it ended, and what else the evaluator says of it."""
    rest = {key: value for key, value in row.items() if key not in (*ASKED, *WANTED, *GIVEN, *SCORED)}
    said = [f"row {rest.pop('id')}"] if "id" in rest else []
    if isinstance(metric := rest.pop("metric", None), str):
        said.append(f"checked by {metric.replace('_', ' ')}")
    if {"finished", "tokens"} <= rest.keys():
        tokens = f"{rest.pop('tokens')} tokens"
        said.append(tokens if rest.pop("finished") else f"cut off after {tokens}")
    return " · ".join([*said, *(f"{key.replace('_', ' ')} {_words(value)[:80]}" for key, value in rest.items())])


def _given(who: str, row: dict[str, Any]) -> Markup:
    said = _first(row, GIVEN)
    right = _right(row)
    mark = {
        True: tag("span", "✓", class_="good", title="right"),
        False: tag("span", "✗", class_="bad", title="wrong"),
    }.get(right)  # type: ignore[arg-type]
    scores = [] if right is not None else [f"{key} {_words(row[key])}" for key in SCORED if row.get(key) is not None]
    line = [
        clipped(_words(said)) if said is not None else "",
        tag("span", ", ".join(scores), class_="rest") if scores else None,
    ]
    return tag(
        "div", tag("span", who, " ", mark, class_="who"), tag("div", *line, class_="said"), class_=f"reply {who}"
    )


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _words(value: Any) -> str:
    if isinstance(value, float):
        return numbers.plain(value)
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in value)
    return value if isinstance(value, str) else str(value)
