"""The filter for plain text."""

from __future__ import annotations

import numpy as np
import pytest

from ftrun.select.base import Table
from ftrun.select.scorers.text_quality import TextQuality

LONG = [f"This line says number {word} and goes on for a while." for word in ("one", "two", "three", "four")]
TEXTS = {
    "good": "\n\n".join(LONG),
    "few lines": "\n".join(LONG[:2]),
    "short lines": "\n".join([*LONG[:2], "yes", "no", "maybe"]),
    "half short": "\n".join([*LONG[:2], "yes", "no"]),
    "repeats lines": "\n".join([*LONG, LONG[0], LONG[1]]),
    "repeats scraps": "\n".join([*LONG, *["---"] * 3]),
    "repeats much": "\n".join([*LONG, LONG[0] * 6, LONG[0] * 6]),
    "copy": "\n\n".join(LONG),
    "blank": "only\n \n\n\n one",
}
KEPT = {"good", "half short", "repeats scraps"}


@pytest.fixture
def scored(make_pool, context):
    scorer, ctx = TextQuality(), context()
    pool = make_pool([{"text": text} for text in TEXTS.values()])
    return scorer, Table(scorer.score(pool, ctx), np.ones(len(pool), np.int64), pool)


def test_what_stays(scored):
    scorer, table = scored
    assert {name for name, kept in zip(TEXTS, scorer.keep(table).tolist(), strict=True) if kept} == KEPT


def test_columns_count_as_one_would_by_hand(scored):
    """Lines, short ones, those said before, and their characters, by a plain loop over the words."""
    _, table = scored
    for place, text in enumerate(TEXTS.values()):
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        before = [line in lines[:number] for number, line in enumerate(lines)]
        characters = sum(map(len, lines))
        expected = {
            "lines": len(lines),
            "short_lines": sum(len(line) < 30 for line in lines) / len(lines),
            "repeated_lines": sum(before) / len(lines),
            "repeated_characters": sum(len(line) for line, again in zip(lines, before, strict=True) if again)
            / characters,
            "quality": sum(
                len(line) for line, again in zip(lines, before, strict=True) if len(line) >= 30 and not again
            )
            / characters,
        }
        assert {name: pytest.approx(table.columns[name][place]) for name in expected} == expected


def test_the_first_of_equal_texts_stays_wherever_it_stands(make_pool, context):
    texts = [TEXTS["good"], TEXTS["half short"], TEXTS["good"]]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        pool = make_pool([{"text": texts[i]} for i in order])
        scorer = TextQuality()
        kept = scorer.keep(Table(scorer.score(pool, context()), np.ones(3, np.int64), pool))
        assert sorted(pool[int(place)].text for place in np.flatnonzero(kept)) == sorted({TEXTS["good"], texts[1]})


def test_knobs_move_the_bounds(scored):
    _, table = scored
    names = list(TEXTS)
    assert TextQuality(minimum_lines=2).keep(table)[names.index("few lines")]
    assert TextQuality(short_share=0.7).keep(table)[names.index("short lines")]
    assert not TextQuality(repeated_lines=0.2).keep(table)[names.index("repeats scraps")]
