"""Equal shares of every kind of row."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ftrun.config.settings import DataConfig
from ftrun.data.pool import load_pool
from ftrun.errors import DataError
from ftrun.select.base import Budget, Table
from ftrun.select.pickers.stratified import Stratified, evenly
from ftrun.select.scorers.random import Random

LANGUAGES = ["de", "en", "fi", "de", "de"]


@pytest.fixture
def table(make_pool) -> Table:
    """Sixty rows: 36 de, 12 en, 12 fi, with random scores and lengths; row 7 has no score."""
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "language": LANGUAGES[i % 5]} for i in range(60)]
    random = np.random.default_rng(0)
    scores = random.random(60)
    scores[7] = np.nan
    return Table({"score": scores}, random.integers(5, 200, 60), make_pool(rows))


def languages(picked: np.ndarray) -> dict[str, int]:
    names = [LANGUAGES[place % 5] for place in picked.tolist()]
    return {name: names.count(name) for name in sorted(set(names))}


def pick(table, ctx, budget, **knobs) -> np.ndarray:
    candidates = np.flatnonzero(~np.isnan(table.columns["score"]))
    return Stratified(**knobs).pick(table, candidates, "score", budget, ctx)


@pytest.mark.parametrize(
    ("rows", "expected"), [(3, [1, 1, 1]), (27, [9, 9, 9]), (45, [22, 12, 11]), (59, [36, 12, 11])]
)
def test_equal_rows_of_every_kind(table, context, rows, expected):
    picked = pick(table, context(), Budget(rows=rows), field="language")
    assert len(set(picked.tolist())) == rows
    assert list(languages(picked).values()) == expected


def test_a_remainder_is_one_row_at_most(table, context):
    for rows in range(1, 33):
        counts = list(languages(pick(table, context(), Budget(rows=rows), field="language")).values())
        assert sum(counts) == rows and (rows < 3 or max(counts) - min(counts) <= 1)


def test_the_best_of_every_kind(table, context):
    picked = pick(table, context(), Budget(rows=12), field="language").tolist()
    for name in set(LANGUAGES):
        own = [place for place in range(60) if LANGUAGES[place % 5] == name and place != 7]
        best = sorted(own, key=lambda place: -table.columns["score"][place])[:4]
        assert [place for place in picked if place in own] == best


@pytest.mark.parametrize("tokens", [600, 1500, 2500])
def test_equal_tokens_of_every_kind(table, context, tokens):
    picked = pick(table, context(), Budget(tokens=tokens), field="language")
    spent = dict.fromkeys(set(LANGUAGES), 0)
    for place in picked.tolist():
        spent[LANGUAGES[place % 5]] += int(table.lengths[place])
    assert sum(spent.values()) <= tokens < sum(spent.values()) + 200
    assert max(spent.values()) - min(spent.values()) <= 200  # the longest row


def test_token_shares_are_even_at_scale():
    """With many rows every kind is within a hundredth of its share."""
    random = np.random.default_rng(1)
    kind, cost = random.integers(0, 9, 20_000), random.integers(20, 400, 20_000).astype(float)
    order = evenly(kind, cost)
    assert sorted(order.tolist()) == list(range(20_000))
    taken = order[: int(np.searchsorted(np.cumsum(cost[order]), 900_000, side="right"))]
    spent = np.bincount(kind[taken], weights=cost[taken])
    assert np.abs(spent - 100_000).max() < 1_000
    for number in range(9):
        assert (np.diff(taken[kind[taken] == number]) > 0).all()  # within a kind as they came


def test_without_a_field_every_source_is_a_kind(tmp_path, context):
    for name, count in (("en", 30), ("de", 10)):
        lines = [json.dumps({"prompt": f"{name} {i}", "completion": "yes"}) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    pool = load_pool(DataConfig(path=[str(tmp_path / "en.jsonl"), str(tmp_path / "de.jsonl")]), tmp_path / "work", 0)
    ctx = context()
    table = Table(Random().score(pool, ctx), np.ones(40, np.int64), pool)
    picked = Stratified().pick(table, np.arange(40), "random", Budget(rows=12), ctx)
    names = [pool.fields(place)["prompt"][:2] for place in picked.tolist()]
    assert names.count("en") == names.count("de") == 6
    assert "2 kinds of rows: source 0 6, source 1 6" in ctx.report.console.file.getvalue()


@pytest.mark.parametrize(("value", "what"), [(None, "has no language"), (["en"], "is no name")])
def test_rows_without_a_kind_are_refused(make_pool, context, value, what):
    rows = [{"prompt": "q", "completion": "a", "language": "en"}, {"prompt": "r", "completion": "a", "language": value}]
    table = Table({"score": np.ones(2)}, np.ones(2, np.int64), make_pool(rows))
    with pytest.raises(DataError, match=what) as error:
        pick(table, context(), Budget(rows=1), field="language")
    assert "row 1" in error.value.what and error.value.where.endswith(":2")
