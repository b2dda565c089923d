"""The selection stage: what it writes, counts and refuses."""

from __future__ import annotations

import errno
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftrun.config.settings import SelectConfig
from ftrun.errors import ConfigError, DataError, ResourceError
from ftrun.reporting.run import Run
from ftrun.select.audit import AUDITED, example_rows
from ftrun.select.run import run_selection
from ftrun.training.scoring import Scoring


@pytest.fixture
def select(context, bundle):
    def run(pool, **asked):
        ctx = context(**asked)
        return run_selection(ctx.settings, pool, lambda: bundle, ctx), ctx

    return run


def read(ctx) -> tuple[pa.Table, list[dict], dict]:
    folder = ctx.out / "selection"
    lines = (folder / "selected.jsonl").read_text().splitlines()
    return (
        pq.read_table(folder / "scores.parquet"),
        [json.loads(line) for line in lines],
        json.loads((folder / "summary.json").read_text()),
    )


def test_files_say_the_same_as_the_result(rows, make_pool, select):
    pool = make_pool(rows)
    selected, ctx = select(pool, select="superfiltering", budget=0.25)
    scores, lines, summary = read(ctx)
    ifd = selected.table.columns["ifd"]
    admitted = np.flatnonzero(ifd < 1)
    expected = admitted[np.argsort(-ifd[admitted], kind="stable")][:6]
    assert selected.ids.tolist() == expected.tolist()
    assert lines == [{**rows[place], "id": place} for place in expected]
    assert scores.schema.names == ["id", "ifd", "conditional", "direct", "selected", "rank"]
    assert [str(kind) for kind in scores.schema.types] == ["int64", "double", "double", "double", "bool", "int64"]
    assert scores["id"].to_pylist() == list(range(24))
    assert np.flatnonzero(scores["selected"].to_numpy()).tolist() == sorted(expected)
    assert {place: rank for place, rank in enumerate(scores["rank"].to_pylist()) if rank} == {
        place: n for n, place in enumerate(expected, 1)
    }
    assert summary["pool"] == 24
    assert summary["picked"] == 6
    assert summary["filtered"] == 24 - len(admitted)
    assert summary["tokens"] == selected.table.lengths[expected].sum()
    assert summary["column"] == "ifd"
    lengths = pq.read_table(ctx.out / "selection" / "lengths.parquet")
    assert lengths.to_pydict() == {"id": list(range(24)), "tokens": selected.table.lengths.tolist()}
    assert sorted(file.name for file in (ctx.out / "selection").iterdir()) == [
        "audit.parquet",
        "examples.jsonl",
        "lengths.parquet",
        "scores.parquet",
        "selected.jsonl",
        "summary.json",
    ]


def test_a_subset_keeps_its_row_numbers(rows, make_pool, select):
    pool = make_pool(rows).subset(np.arange(4, 24))
    _, ctx = select(pool, select="longest", budget=3)
    scores, lines, _ = read(ctx)
    assert scores["id"].to_pylist() == list(range(4, 24))
    for line in lines:
        assert line == {**rows[line["id"]], "id": line["id"]}


def test_processes_write_the_same_file_once(rows, make_pool, context, bundle, together):
    pool = make_pool(rows)
    alone = context(select="superfiltering", budget=5, shared=SelectConfig(batch_tokens=64))
    run_selection(alone.settings, pool, lambda: bundle, alone)
    before = [(alone.out / "selection" / name).read_bytes() for name in ("scores.parquet", "selected.jsonl")]

    def work(team):
        ctx = context(select="superfiltering", budget=5, shared=SelectConfig(batch_tokens=64), team=team)
        return run_selection(ctx.settings, pool, lambda: bundle, ctx).ids.tolist()

    results = together(2, work)
    assert results[0] == results[1]
    assert [(alone.out / "selection" / name).read_bytes() for name in ("scores.parquet", "selected.jsonl")] == before


def test_none_takes_every_row_in_order(rows, make_pool, select):
    selected, ctx = select(make_pool(rows), select="none")
    scores, lines, _ = read(ctx)
    assert selected.ids.tolist() == list(range(24))
    assert scores.schema.names == ["id", "selected", "rank"]
    assert [line["id"] for line in lines] == list(range(24))


def test_kmeans_random_works_without_a_scorer(rows, make_pool, select):
    selected, _ = select(
        make_pool(rows),
        select="none",
        picker="kmeans_random",
        picker_knobs={"clusters": 4, "embedding": "model"},
        budget=8,
    )
    assert len(set(selected.ids.tolist())) == 8


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"select": "random"}, "select=random needs a budget"),
        ({"select": "none", "budget": 0.5}, "select=none takes every row"),
        ({"select": "none", "picker": "top_k", "budget": 0.5}, "select=none gives none"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(rows, make_pool, select, asked, message):
    with pytest.raises(ConfigError, match=message):
        select(make_pool(rows), **asked)


def test_threshold_does_without_a_budget(rows, make_pool, select):
    selected, _ = select(make_pool(rows), select="longest", picker="threshold", picker_knobs={"minimum": 20})
    tokens = selected.table.columns["tokens"]
    assert 0 < len(selected.ids) < 24
    assert sorted(selected.ids.tolist()) == np.flatnonzero(tokens >= 20).tolist()


@pytest.mark.parametrize(("budget", "rows_taken"), [(0.29, 29), (1.0, 100), (7, 7)])
def test_shares_round_down_exactly(make_pool, select, budget, rows_taken):
    pool = make_pool([{"text": f"row {i}"} for i in range(100)])
    assert len(select(pool, budget=budget)[0].ids) == rows_taken


def test_a_budget_of_tokens(rows, make_pool, select):
    selected, _ = select(make_pool(rows), select="longest", budget="100_tokens")
    spent = selected.table.lengths[selected.ids]
    assert spent.sum() <= 100 < spent.sum() + np.sort(selected.table.lengths)[::-1][len(spent)]


def test_a_budget_beyond_the_rows_is_said(rows, make_pool, select):
    selected, ctx = select(make_pool(rows), budget=100)
    assert len(selected.ids) == 24
    assert "asks for 100 rows, 24 are picked" in ctx.report.warnings[0]


@pytest.fixture
def half_scored(make_pool):
    rows = [{"prompt": f"what is {i}", "completion": f"answers: {i} yes"} for i in range(8)]
    return make_pool([*rows, {"prompt": "one", "completion": "a"}, {"prompt": "two", "completion": "b"}])


def test_rows_without_a_score_are_counted_and_left_out(half_scored, select):
    selected, ctx = select(half_scored, select="superfiltering", picker="threshold", picker_knobs={"minimum": 0})
    scores, _, summary = read(ctx)
    assert summary["unscored"] == {
        "rows": 2,
        "reasons": {"a one-token response has no direct loss": {"rows": 2, "ids": [8, 9]}},
    }
    assert np.isnan(scores["ifd"].to_numpy()[8:]).all()
    assert not {8, 9} & set(selected.ids.tolist())


def test_unscored_keep_picks_them_last(half_scored, select):
    selected, _ = select(half_scored, select="superfiltering", budget=10, shared=SelectConfig(unscored="keep"))
    assert selected.ids.tolist()[-2:] == [8, 9]


def test_nothing_picked_is_refused(make_pool, select):
    pool = make_pool([{"prompt": "one", "completion": "a"}])
    with pytest.raises(DataError, match="picks nothing") as refused:
        select(pool, select="superfiltering", budget=1)
    assert "1 rows: 1 without a score" in str(refused.value)
    assert "one-token response" in str(refused.value)
    with pytest.raises(DataError, match="picks nothing") as refused:
        select(make_pool([{"prompt": "one", "completion": "two three"}] * 3), select="long_output_min", budget=2)
    assert "No row passes that filter" in str(refused.value)
    with pytest.raises(DataError, match="picks nothing"):
        select(make_pool([{"text": "a"}, {"text": "b"}]), budget=0.1)


def test_an_id_of_the_row_itself_is_not_lost(make_pool, select):
    _, ctx = select(make_pool([{"id": "abc", "text": "one"}]), budget=1)
    assert read(ctx)[1] == [{"id": 0, "original_id": "abc", "text": "one"}]


def test_a_killed_selection_goes_on(rows, make_pool, select, monkeypatch):
    pool, asked = make_pool(rows), {"select": "superfiltering", "budget": 5, "shared": SelectConfig(batch_tokens=64)}
    compute, computed = Scoring._compute, []

    def count(limit: int):
        def counted(self, texts, name, measure, keys, places, packed):
            if len(computed) >= limit:
                raise KeyboardInterrupt
            computed.extend(keys)
            return compute(self, texts, name, measure, keys, places, packed)

        monkeypatch.setattr(Scoring, "_compute", counted)

    count(1000)
    expected = select(pool, **asked)[0].table.columns["ifd"]
    texts = len(computed)
    computed.clear()
    count(30)
    with pytest.raises(KeyboardInterrupt):
        select(pool, **asked)
    assert 30 <= len(computed) < texts
    count(1000)
    selected, ctx = select(pool, **asked)
    np.testing.assert_array_equal(selected.table.columns["ifd"], expected)
    assert len(computed) == texts  # none twice
    assert not (ctx.out / "selection" / "shards").exists()


def test_the_rows_that_the_report_shows_are_kept(rows, make_pool, select):
    rows = [{**row, "source": f"page {number}"} for number, row in enumerate(rows)]
    pool = make_pool(rows).subset(np.arange(4, 24))
    selected, ctx = select(pool, select="longest", budget=3)
    kept = [json.loads(line) for line in (ctx.out / "selection" / "examples.jsonl").read_text().splitlines()]
    scores = pq.read_table(ctx.out / "selection" / "scores.parquet")
    picked = scores["selected"].to_numpy()
    shown = example_rows(picked, scores["tokens"].to_numpy(), scores["rank"].to_numpy(), AUDITED)
    assert [line["id"] for line in kept] == sorted(4 + place for places in shown.values() for place in places.tolist())
    assert all(line == {**rows[line["id"]], "id": line["id"]} for line in kept)
    assert len(kept) > 3 and Run(ctx.out).row_lengths.tolist() == selected.table.lengths.tolist()


def test_without_a_score_there_are_no_examples(rows, make_pool, select):
    _, ctx = select(make_pool(rows), select="none")
    assert (ctx.out / "selection" / "examples.jsonl").read_text() == ""
    assert read(ctx)[2]["column"] is None


@pytest.mark.parametrize("failing", ["lengths.parquet", "scores.parquet"])
def test_a_failure_while_writing_leaves_nothing(rows, make_pool, context, bundle, monkeypatch, failing):
    ctx = context(select="longest", budget=3)
    write_table = pq.write_table

    def fails(table, path):
        if path.name == failing:
            path.write_bytes(b"PAR1")
            raise OSError(errno.ENOSPC, "No space left on device")
        write_table(table, path)

    monkeypatch.setattr(pq, "write_table", fails)
    with pytest.raises(ResourceError, match="the disk is full"):
        run_selection(ctx.settings, make_pool(rows), lambda: bundle, ctx)
    assert list((ctx.out / "selection").iterdir()) == []


def test_the_audit_says_what_became_of_every_row(half_scored, select):
    selected, ctx = select(half_scored, select="superfiltering", picker="threshold", picker_knobs={"minimum": 0})
    audit = pq.read_table(ctx.out / "selection" / "audit.parquet").to_pydict()
    assert audit["id"] == list(range(10))
    assert audit["reason"] == [None] * 8 + ["a one-token response has no direct loss"] * 2
    assert audit["admitted"] == (selected.table.columns["ifd"] < 1).tolist()
    lengths, tokens = selected.table.lengths, selected.table.lengths[selected.ids].sum()
    random = np.array(audit["random"])
    assert tokens - lengths.max() < lengths[random].sum() <= tokens  # equal up to one row
    assert len(audit["cluster"]) == 10 and read(ctx)[2]["clusters"]["by"] == "hashed bag of words"


def test_embeddings_of_the_scorer_are_kept_unless_too_large(rows, make_pool, select, monkeypatch):
    from ftrun.select import audit
    from ftrun.select.scorers.random import Random

    score = Random.score
    made = np.random.default_rng(0).standard_normal((24, 8)).astype(np.float32)

    def embeds(self, pool, ctx):
        ctx.scorer.embeddings = made
        return score(self, pool, ctx)

    monkeypatch.setattr(Random, "score", embeds)
    _, ctx = select(make_pool(rows), budget=3)
    file = ctx.out / "selection" / "embeddings.npy"
    np.testing.assert_allclose(np.load(file, allow_pickle=False), made, rtol=1e-3)
    assert read(ctx)[2]["clusters"]["by"] == "embeddings of the scorer"
    file.unlink()
    monkeypatch.setattr(audit, "STORED_VALUES", 24 * 8 - 1)
    select(make_pool(rows), budget=3)
    assert not file.exists()
