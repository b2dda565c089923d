"""Checking a generated text against what a row says is right."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from ftrun.data.records import Record
from ftrun.data.verify import verifier
from ftrun.errors import DataError

# a minus after a word, a digit or a bracket subtracts
NUMBER = re.compile(r"(?:(?<![\w)\]])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


@dataclass
class Check:
    """How one row's answer is judged. ``score`` maps a text to a number from 0 (wrong) to 1 (right)."""

    metric: str
    gold: str
    score: Callable[[str], float]


def check_of(record: Record, metric: str, where: str) -> Check:
    """The check that ``metric`` means for this row. Raises DataError where the row lacks what the check needs.

    auto: the row's verifier if it has one; else the last number, if the answer field is a number; else the same text as
    the answer field or the response, apart from case, spaces and final punctuation.
    """
    gold = str(record.answer) if record.answer is not None else record.response
    if metric == "auto":
        if record.verifier:
            metric = "verifier"
        else:
            metric = "last_number" if record.answer is not None and _is_number(gold) else "exact_match"
    if metric == "verifier":
        if not record.verifier:
            raise DataError(f"row {record.id} has no verifier", where, "Use eval.generation.metric=auto.")
        verify = verifier(record.verifier)
        return Check(metric, gold, lambda text: verify(text, record.fields))
    if not gold.strip():
        raise DataError(f"row {record.id} has neither an answer nor a response to compare with", where)
    if metric == "last_number":
        number = last_number(gold)
        if number is None:
            raise DataError(f"row {record.id} has no number in its answer", where, "Use eval.generation.metric=auto.")
        return Check(metric, gold, lambda text: float(last_number(text) == number))
    wanted = normalised(gold)
    scores: dict[str, Callable[[str], float]] = {
        "exact_match": lambda text: float(normalised(text) == wanted),
        "contains": lambda text: float(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", normalised(text)) is not None),
        "word_f1": lambda text: word_f1(text, gold),
    }
    return Check(metric, gold, scores[metric])


def last_number(text: str) -> Decimal | None:
    """The last number of a text; thousands may be separated by commas."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _is_number(text: str) -> bool:
    return NUMBER.fullmatch(text.strip().strip("$€£%. ")) is not None


def normalised(text: str) -> str:
    """Lower case, single spaces, nothing but words at the end."""
    return " ".join(text.lower().split()).rstrip(".!?,;: ")


def word_f1(text: str, gold: str) -> float:
    """Harmonic mean of the shares of words that text and gold have in common."""
    ours, theirs = (Counter(re.findall(r"\w+", part.lower())) for part in (text, gold))
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0
