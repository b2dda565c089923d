"""Problems of the families of reasoning-gym, as many as asked for, none of them twice; every answer can be checked.

``builtin:reasoning_gym/FAMILY:ROWS``, with the family's own knobs as ``builtin:reasoning_gym/FAMILY?KNOB=VALUE&...:ROWS``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from ftrun.errors import ConfigError, DataError, nearest

DEFAULT_ROWS = 1000
SEED = 42
TRIES = 50  # problems generated for one that is new
LAST = 10_000  # problems of a family; some make them all at the start
ANSWER = re.compile(r".*(?:\bis|####|=|:)\s+(.+)", re.DOTALL)
# families whose answers are not always true
UNTRUE = {"family_relationships": "it calls nieces, nephews and children-in-law by what the other person is to them"}


def rows(count: int | None = None, problem: str = "") -> Iterator[dict[str, Any]]:
    """Alpaca rows with ``answer``, and ``problem`` and ``index`` to find the problem again; no question comes twice.

    The first n rows are the same whatever the count. Raises ConfigError for an unknown family or knob, and for a family
    that has fewer different problems or none with one written answer.
    """
    family, wanted = _family(problem), count or DEFAULT_ROWS
    asked: set[str] = set()
    for index in range(min(wanted * TRIES, LAST)):
        entry = family[index]
        question, answer = entry["question"], entry["answer"]
        if answer is None or question in asked or family.score_answer(answer, entry) < 1:
            continue
        asked.add(question)
        yield {
            "instruction": question,
            "input": "",
            "output": str(answer),
            "answer": str(answer),
            "verifier": "reasoning_gym",
            "problem": problem,
            "index": index,
        }
        if len(asked) == wanted:
            return
    raise ConfigError(
        f"{problem} has no {wanted:,} different problems with a written answer: {len(asked):,} were found",
        f"builtin:reasoning_gym/{problem}:{wanted}",
        "Ask for fewer, or let its knobs vary more.",
    )


def verify(text: str, row: dict[str, Any]) -> float:
    """1.0 if the family takes ``text``, its last line, or what follows its last "is", ":", "####" or "=" as right.

    Partial credit counts as wrong. The problem is generated again, for what a family needs to check an answer is more
    than the answer.
    """
    family = _family(row["problem"])
    entry = family[int(row["index"])]
    if entry["question"] != row["instruction"]:
        raise DataError(
            f"reasoning-gym makes another problem {row['index']} of {row['problem']} than the row holds",
            f"builtin:reasoning_gym/{row['problem']}",
            "Make the rows again with the version that is installed.",
        )
    return float(any(family.score_answer(said, entry) >= 1 for said in _readings(text)))


def _readings(text: str) -> set[str]:
    """What a text may mean as its answer."""
    text = text.strip()
    found = {text, *text.split("\n")[-1:]}
    found |= {match[1] for said in list(found) if (match := ANSWER.fullmatch(said))}
    found |= {said.strip().strip("*$`").strip().rstrip(".") for said in list(found)}
    return found - {""}


@cache
def _family(problem: str) -> Any:
    """The generator of ``FAMILY`` or ``FAMILY?KNOB=VALUE&...``."""
    try:
        from reasoning_gym import create_dataset
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(
            "builtin:reasoning_gym needs the package reasoning-gym", "", "pip install reasoning-gym"
        ) from error
    where = f"builtin:reasoning_gym/{problem}"
    name, _, knobs = problem.partition("?")
    if name not in DATASETS:
        raise ConfigError(f'reasoning-gym has no family "{name}"', where, nearest(name, list(DATASETS)))
    if name in UNTRUE:
        raise ConfigError(f"the answers of {name} are not always true: {UNTRUE[name]}", where, "Take another family.")
    fixed = {"seed": SEED, "size": LAST}
    try:
        return create_dataset(name, **fixed, **_knobs(knobs, DATASETS[name][1], fixed, where))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"reasoning-gym refuses these knobs of {name}: {error}", where) from error


def _knobs(text: str, config: type, fixed: dict[str, int], where: str) -> dict[str, Any]:
    """Knobs of a family by name, each of the type of its default. Raises ConfigError."""
    defaults = {
        name: value
        for name, value in vars(config()).items()
        if isinstance(value, bool | int | float | str) and name not in fixed
    }
    found = {}
    for part in filter(None, text.split("&")):
        name, _, value = part.partition("=")
        if name not in defaults:
            raise ConfigError(f'there is no knob "{name}"', where, nearest(name, list(defaults)))
        kind = type(defaults[name])
        try:
            found[name] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{name}={value} is not of type {kind.__name__}", where) from error
    return found
