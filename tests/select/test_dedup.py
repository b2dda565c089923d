"""Near-duplicates: which rows fall, and as duplicates of which."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from ftrun.config.settings import SelectConfig
from ftrun.errors import ConfigError
from ftrun.select import dedup
from ftrun.select.base import Table
from ftrun.select.dedup import by_vectors, by_words, jaccard, shingles, signatures
from ftrun.select.run import run_selection


def plain_jaccard(one: str, other: str) -> float:
    def triples(text):
        words = text.split()
        size = min(3, len(words))
        return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

    a, b = triples(one), triples(other)
    return len(a & b) / len(a | b)


@pytest.fixture
def texts() -> list[str]:
    random = np.random.default_rng(0)
    made = [" ".join(f"w{n}" for n in random.integers(0, 300, 40)) for _ in range(60)]
    for number in range(30):  # rows with 1 to 5 words changed
        words = made[number].split()
        for place in random.choice(40, 1 + number % 5, replace=False):
            words[place] = f"new{number}x{place}"
        made.append(" ".join(words))
    return [made[i] for i in random.permutation(len(made))]


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_words_against_all_pairs(texts, threshold):
    expected = np.full(len(texts), -1)
    for row, text in enumerate(texts):
        kept = [other for other in range(row) if expected[other] < 0]
        near = [plain_jaccard(text, texts[other]) for other in kept]
        if near and max(near) >= threshold:
            expected[row] = kept[int(np.argmax(near))]
    assert (expected >= 0).sum() > 3
    assert by_words(texts, threshold).tolist() == expected.tolist()


def test_signatures_estimate_the_jaccard_similarity(texts):
    sets = [shingles(text) for text in texts]
    found = signatures(sets)
    for one, other in [(i, j) for i in range(len(texts)) for j in range(i)]:
        exact = plain_jaccard(texts[one], texts[other])
        assert jaccard(sets[one], sets[other]) == pytest.approx(exact)
        assert abs((found[one] == found[other]).mean() - exact) < 0.2


def test_signatures_do_not_depend_on_the_chunks(texts, monkeypatch):
    sets = [shingles(text) for text in ["", *texts, "one"]]
    whole = signatures(sets)
    monkeypatch.setattr(dedup, "ENTRIES", 50)
    assert (signatures(sets) == whole).all()


def test_short_and_empty_texts():
    assert by_words(["", "yes", "Yes", "no", "", "?!", "?!", "?", "a b", "a b c"], 0.8).tolist() == [
        *(-1, -1, 1, -1, -1, -1, 5, -1, -1, -1)
    ]
    assert by_words(["2 plus 3 is 5", "2 plus 4 is 6"], 0.8).tolist() == [-1, -1]  # numbers are words


def test_vectors_against_all_pairs(monkeypatch):
    monkeypatch.setattr(dedup, "BLOCK", 16)
    random = np.random.default_rng(0)
    made = random.normal(size=(50, 6))
    made = np.concatenate([made, made[:30] + random.normal(0, 0.1, (30, 6)), np.zeros((2, 6))])[random.permutation(82)]
    length = np.linalg.norm(made, axis=1, keepdims=True)
    vectors = (made / np.where(length > 0, length, 1)).astype(np.float32)
    expected = np.full(82, -1)
    for row in range(82):
        kept = [other for other in range(row) if expected[other] < 0]
        near = [float(vectors[row] @ vectors[other]) for other in kept]
        if near and max(near) >= 0.95:
            expected[row] = kept[int(np.argmax(near))]
    assert (expected >= 0).sum() > 10
    assert by_vectors(vectors, 0.95, print).tolist() == expected.tolist()


def test_the_nearest_row_stands_for_a_copy_wherever_it_is(monkeypatch):
    """Of two kept rows that are near enough, the second nearer and in the same block as the row that falls."""
    monkeypatch.setattr(dedup, "BLOCK", 2)
    angle = np.radians([0, 90, 20, 18])
    vectors = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    assert by_vectors(vectors, np.cos(np.radians(19)), print).tolist() == [-1, -1, -1, 2]


@pytest.fixture
def repeated(rows) -> list[dict[str, str]]:
    """24 different rows, a copy of one, and a copy of another in capitals."""
    long = [{**row, "output": row["output"] + f" because w{i}a w{i}b w{i}c w{i}d"} for i, row in enumerate(rows)]
    return [*long, dict(long[3]), {**long[5], "output": long[5]["output"].upper()}]


@pytest.fixture
def select(context, bundle):
    def run(pool, **asked):
        ctx = context(**asked)
        return run_selection(ctx.settings, pool, lambda: bundle, ctx), ctx

    return run


def test_fallen_rows_are_written_and_not_picked(repeated, make_pool, select):
    pool = make_pool(repeated)
    selected, ctx = select(
        pool, select="random", budget=1.0, shared=SelectConfig(dedup="minhash", dedup_threshold=0.99)
    )
    table = pq.read_table(ctx.out / "selection/scores.parquet")
    assert str(table.schema.field("duplicate_of").type) == "int64"
    found = table["duplicate_of"].to_pylist()
    fallen = {place: other for place, other in enumerate(found) if other is not None}
    assert len(selected.ids) == 24 and not set(selected.ids.tolist()) & set(fallen)
    assert sorted(sorted(pair) for pair in fallen.items()) == [[3, 24], [5, 25]]
    for place, other in fallen.items():
        assert pool.hashes[place] >= pool.hashes[other]
    summary = json.loads((ctx.out / "selection/summary.json").read_text())
    assert summary["duplicates"] == {"by": "minhash", "threshold": 0.99, "rows": 2}
    said = " ".join(ctx.report.console.file.getvalue().split())
    assert "2 near-duplicates left out" in said and "2 near-duplicates, 24 to pick from" in said


def test_the_order_of_the_pool_does_not_matter(repeated, make_pool, select):
    order = np.random.default_rng(2).permutation(len(repeated))

    def kept(rows) -> set[str]:
        shared = SelectConfig(dedup="minhash", dedup_threshold=0.6)
        selected, _ = select(make_pool(rows), select="random", budget=1.0, shared=shared)
        return {rows[place]["instruction"] + rows[place]["output"] for place in selected.ids.tolist()}

    assert kept(repeated) == kept([repeated[place] for place in order])


def test_a_row_that_cannot_be_picked_stands_for_none(make_pool, select):
    """The row without a score says the same; its twin is still there to be picked."""
    rows = [{"prompt": f"tell me about w{i} and v{i}", "completion": f"it is u{i} and t{i} of s{i}"} for i in range(6)]
    pool = make_pool(rows)
    first = int(np.argmin(pool.hashes))
    again = [*rows, dict(rows[first])]
    selected, _ = select(make_pool(again), select="longest", budget=1.0, shared=SelectConfig(dedup="minhash"))
    assert len(selected.ids) == 6
    assert selected.table.duplicate_of is not None
    assert np.flatnonzero(selected.table.duplicate_of >= 0).tolist() == [6]


def test_without_dedup_there_is_no_column(rows, make_pool, select):
    _, ctx = select(make_pool(rows), select="random", budget=0.5)
    assert "duplicate_of" not in pq.read_table(ctx.out / "selection/scores.parquet").schema.names
    assert "duplicates" not in json.loads((ctx.out / "selection/summary.json").read_text())


def test_duplicates_can_be_left_out_without_a_selector(repeated, make_pool, select):
    shared = SelectConfig(dedup="minhash", dedup_threshold=0.99)
    selected, ctx = select(make_pool(repeated), select="none", shared=shared)
    assert ctx.settings.selects and len(selected.ids) == 24


def test_embeddings_of_the_scorer_are_compared(rows, make_pool, context):
    table_rows = make_pool(rows)
    vectors = np.eye(24, dtype=np.float32)
    vectors[7] = vectors[2]
    table = Table({}, np.ones(24, np.int64), table_rows, embeddings=vectors)
    found = dedup.duplicates(table, np.arange(24), "embedding", None, context())
    fell, kept = sorted((2, 7), key=lambda place: -int(table_rows.hashes[place]))
    assert np.flatnonzero(found >= 0).tolist() == [fell] and found[fell] == kept


def test_a_threshold_out_of_bounds(rows, make_pool, select):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        select(make_pool(rows), select="random", budget=1.0, shared=SelectConfig(dedup="minhash", dedup_threshold=1.5))
