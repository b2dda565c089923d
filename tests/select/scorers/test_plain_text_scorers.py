"""zip and long_output_min: scores that need no model."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest

from ftrun.errors import ConfigError
from ftrun.select.base import Budget, Table
from ftrun.select.pickers.zip import Archive, ZipPicker
from ftrun.select.scorers.long_output_min import LongOutputMin
from ftrun.select.scorers.zip import Zip
from ftrun.select.scoring.lengths import demanded_lengths, length_score, text_length


def text_of(row) -> bytes:
    prompt = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
    return f"{prompt}\n{row['output']}\n".encode()


def ratio(*texts: bytes) -> float:
    data = b"".join(texts)
    return len(data) / len(zlib.compress(data, 9))


@pytest.fixture
def words() -> list[bytes]:
    """Texts of random words, the later ones from fewer of them."""
    random = np.random.default_rng(0)
    return [" ".join(f"word{random.integers(3 + 2000 // (i + 1))}" for _ in range(60)).encode() for i in range(40)]


def test_trying_a_text_is_compressing_everything_again(words):
    archive, chosen = Archive(), []
    for _ in range(8):
        for text in [*words, b""]:
            if chosen or text:
                assert archive.ratio_with(text) == ratio(*chosen, text)
        chosen += words[len(chosen) : len(chosen) + 5]
        for text in chosen[-5:]:
            archive.add(text)


def test_a_novel_text_never_raises_the_ratio(words):
    archive = Archive()
    for text in words * 3:
        archive.add(text)
    before = archive.ratio_with(b"")
    novel = bytes(np.random.default_rng(1).integers(0, 256, 400, dtype=np.uint8))
    assert archive.ratio_with(novel) < before < archive.ratio_with(words[0])


def test_zip_scores_rows_by_themselves(rows, make_pool, context):
    scores = Zip().score(make_pool(rows), context())
    np.testing.assert_allclose(scores["ratio"], [ratio(text_of(row)) for row in rows])
    np.testing.assert_allclose(scores["zip"] * scores["ratio"], 1)


def plain_picks(texts: list[bytes], first: int, second: int, third: int, budget: int) -> list[int]:
    """The three stages, compressing everything every time."""
    known, chosen, left = [ratio(text) for text in texts], [], list(range(len(texts)))
    while left and len(chosen) < budget:
        tried = sorted(left, key=lambda i: (known[i], i))[:first]
        for i in tried:
            known[i] = ratio(*(texts[c] for c in chosen), texts[i])
        allowed = sorted(tried, key=lambda i: (known[i], i))[:second]
        for _ in range(min(third, len(allowed))):
            best = min(allowed, key=lambda i: (ratio(*(texts[c] for c in chosen), texts[i]), i))
            allowed.remove(best)
            left.remove(best)
            chosen.append(best)
    return chosen[:budget]


@pytest.mark.parametrize(("first", "second", "third", "budget"), [(10, 5, 3, 12), (100, 4, 4, 24), (24, 24, 1, 7)])
def test_zip_picks_as_the_three_stages_say(rows, make_pool, context, first, second, third, budget):
    pool = make_pool(rows)
    table = Table({}, np.full(len(rows), 10), pool)
    picker = ZipPicker(first=first, second=second, third=third)
    everyone = np.arange(len(rows))
    expected = plain_picks([text_of(row) for row in rows], first, second, third, budget)
    assert picker.pick(table, everyone, "", Budget(rows=budget), context()).tolist() == expected
    assert picker.pick(table, everyone, "", Budget(tokens=10 * budget + 9), context()).tolist() == expected


@pytest.mark.parametrize("knobs", [{"first": 0}, {"second": 0}, {"third": -1}], ids=repr)
def test_a_stage_that_lets_nothing_through_is_refused(knobs):
    with pytest.raises(ConfigError, match="at least 1"):
        ZipPicker(**knobs)


def test_zip_says_beforehand_when_it_takes_long(make_pool, context, rows):
    ctx = context()
    ZipPicker()._announce(Table({}, np.ones(1, np.int64)), 1_000_000, Budget(rows=50_000), ctx)
    assert "minutes" in ctx.report.console.file.getvalue()
    quiet = context()
    ZipPicker()._announce(Table({}, np.ones(1, np.int64)), 1000, Budget(rows=100), quiet)
    assert quiet.report.console.file.getvalue() == ""


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Write an essay of 1000 words on tea.", {1000}),
        ("Write 1,200 words.", {1200}),
        ("Between 500 words and 700 words.", {500, 700}),
        ("500 words. I said 500 words!", {500}),
        ("A 500-word essay in five words", set()),
        ("写一篇800字的文章", {800}),
        ("写一篇 800 字的文章，约三千字", {800, 3000}),
        ("写一篇十五万字的小说", {150_000}),
        ("写两千字", {2000}),
        ("不少于五百字", {500}),
        ("字数不限", set()),
        ("0 words", set()),
    ],
)
def test_demands_are_read(prompt, expected):
    assert demanded_lengths(prompt, []) == expected


def test_further_patterns_count_too():
    assert demanded_lengths("in 12 lines and 30 words", [r"(\d+) lines"]) == {12, 30}
    for pattern in ("(", "no group"):
        with pytest.raises(ConfigError):
            LongOutputMin(patterns=[pattern])


def test_chinese_counts_characters_and_english_words():
    assert text_length("It's a well-known fact, isn't it?") == 6
    assert text_length("今天天气很好。") == 6
    assert text_length("我爱 tea 和 2 apples") == 6
    assert text_length("") == 0


def test_the_length_score():
    assert length_score(500, 500) == 100
    assert length_score(2000, 500) == length_score(0, 500) == 0
    assert length_score(500, 1500) == pytest.approx(0)
    assert length_score(750, 500) == pytest.approx(100 * (1 - 0.5 / 3))
    assert length_score(400, 500) == pytest.approx(100 * (1 - 0.25 / 2))
    # at least 80: from required / 1.4 to 1.6 times required
    kept = [length for length in range(1, 3000) if length_score(length, 1000) >= 80]
    assert (kept[0], kept[-1]) == (math.ceil(1000 / 1.4), 1600)


def make_rows() -> list[dict[str, str]]:
    def row(prompt: str, words: int) -> dict[str, str]:
        return {"prompt": prompt, "completion": "word " * words}

    return [
        row("Write 100 words.", 100),
        row("Write 100 words.", 165),
        row("Write 100 words or 200 words.", 100),
        row("Write 100 words on tea.", 72),
        *(row(f"Write about {i} things.", 5) for i in range(30)),
    ]


def test_long_rows_that_keep_to_their_length_and_some_general_ones(make_pool, context):
    pool, ctx, scorer = make_pool(make_rows()), context(), LongOutputMin(general=3)
    scores = scorer.score(pool, ctx)
    table = Table(scores, np.ones(len(pool), np.int64))
    kept = scorer.keep(table)
    assert kept[:4].tolist() == [True, False, False, True] and kept[4:].sum() == 2 * 3
    said = " ".join(ctx.report.console.file.getvalue().split())
    assert "2 of 3 rows that state a length keep it; 6 general rows come with them" in said and "wanted" not in said
    np.testing.assert_allclose(
        scores["length_score"][[0, 1, 3]], [100, 100 * (1 - 0.65 / 3), 100 * (1 - (28 / 72) / 2)]
    )
    assert ctx.scorer.reasons == {2: "states several lengths"}
    assert scores["long_output_min"][4:].max() < 1 < scores["long_output_min"][[0, 3]].min()
    chosen = pool.subset(pool.ids[kept])
    again = scorer.keep(Table(scorer.score(chosen, context()), np.ones(len(chosen), np.int64)))
    assert again.all()  # filtering twice changes nothing


def test_the_choice_of_general_rows_does_not_depend_on_the_order(make_pool, context):
    rows, scorer = make_rows(), LongOutputMin(general=2)
    order = np.random.default_rng(0).permutation(len(rows))

    def kept(some) -> set[str]:
        pool = make_pool(some)
        mask = scorer.keep(Table(scorer.score(pool, context()), np.ones(len(pool), np.int64)))
        return {row["prompt"] for row, keep in zip(some, mask, strict=True) if keep}

    assert kept(rows) == kept([rows[i] for i in order])


def test_a_pool_without_stated_lengths_is_told(make_pool, context, rows):
    ctx, scorer = context(), LongOutputMin()
    pool = make_pool(rows)
    scores = scorer.score(pool, ctx)
    assert not scorer.keep(Table(scores, np.ones(len(pool), np.int64))).any()
    assert "no row states a length" in ctx.report.console.file.getvalue()


def test_too_few_general_rows_are_told(make_pool, context):
    ctx, scorer = context(), LongOutputMin()
    scores = scorer.score(make_pool(make_rows()), ctx)
    assert scorer.keep(Table(scores, np.ones(34, np.int64))).sum() == 2 + 30
    assert "30 general rows come with them of 40 wanted" in " ".join(ctx.report.console.file.getvalue().split())
    with pytest.raises(ConfigError, match="not be negative"):
        LongOutputMin(general=-1)
