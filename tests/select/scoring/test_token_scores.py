"""What scorers keep of single tokens: the numbers behind a row's score, and what explain shows of them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from ftrun import cli
from ftrun.config.settings import DataConfig
from ftrun.select.scorers.trim import Trim
from ftrun.select.scorers.tshirt import Tshirt
from ftrun.select.scoring import token_scores
from ftrun.select.scoring.texts import read_turns
from ftrun.select.scoring.token_scores import Scored, write_token_scores


def written(ctx) -> dict[str, list]:
    return pq.read_table(ctx.selection / "token_scores.parquet").to_pydict()


def by_row(columns: dict[str, list], name: str) -> dict[int, np.ndarray]:
    ids = np.array(columns["id"])
    return {int(id): np.array(columns[name])[ids == id] for id in np.unique(ids)}


def test_tshirt_keeps_the_gap_of_every_token(rows, make_pool, context, bundle, plain_nll):
    """Without noise the mean gap is that of the row itself, and a token counts in all copies or in none."""
    ctx = context()
    pool = make_pool(rows).subset(np.arange(2, 24))
    scores = Tshirt(copies=2, alpha=0.0).score(pool, ctx)
    columns = written(ctx)
    gaps, weights = by_row(columns, "score"), by_row(columns, "weight")
    assert sorted(gaps) == list(range(2, 24))
    for place, id in enumerate(pool.ids.tolist()):
        row = rows[id]
        prompt = bundle.tokenizer(row["instruction"] + "\n" + (row["input"] + "\n") * bool(row["input"])).input_ids
        response = bundle.tokenizer(row["output"]).input_ids
        expected = plain_nll(bundle, prompt + response)[len(prompt) :] - plain_nll(bundle, response)
        np.testing.assert_allclose(gaps[id], expected, atol=1e-5)
        assert set(weights[id].tolist()) <= {0.0, 1.0}
        counted = expected[weights[id] > 0]
        assert scores["s_ifd"][place] == pytest.approx(np.exp(counted.mean()) if len(counted) else 1, rel=1e-4)
        assert by_row(columns, "position")[id].tolist() == list(range(len(prompt) + 1, len(prompt) + len(response)))
        assert "".join(by_row(columns, "token")[id]) == bundle.tokenizer.decode(response[1:])


def test_a_token_counts_in_a_share_of_the_copies(rows, make_pool, context):
    ctx = context()
    Tshirt(copies=4).score(make_pool(rows), ctx)
    weights = np.array(written(ctx)["weight"])
    assert set(np.unique(weights)) <= {0.0, 0.25, 0.5, 0.75, 1.0} and 0.3 < weights.mean() < 0.7


def test_trim_keeps_what_a_row_is_the_mean_and_the_top_of(rows, make_pool, context, queries):
    ctx = context(select="trim", shared=queries(rows[:2], rows[5:8]), data=DataConfig(path="-"))
    scores = Trim(layers=2, warmup=0.0).score(make_pool(rows), ctx)
    columns = written(ctx)
    assert columns.keys() == {"id", "position", "token", "score"}
    for id, values in by_row(columns, "score").items():
        assert values.mean() == pytest.approx(scores["mean"][id], rel=1e-5)
        assert values.max() == pytest.approx(scores["top"][id], rel=1e-5)


def test_turns_of_a_row_count_on(make_pool, context):
    turns = [{"role": role, "content": text} for role, text in (("user", "what"), ("assistant", "yes no yes"))]
    pool = make_pool([{"messages": turns}, {"messages": turns * 2}])
    ctx = context()
    Tshirt(copies=1, template="chat").score(pool, ctx)
    made = read_turns(pool, ctx, "chat")
    assert made.starts.tolist() == [0, 0, len(made.prompt[1]) + len(made.response[1])]
    positions = by_row(written(ctx), "position")[1]
    assert (np.diff(positions) > 0).all() and len(positions) == 2 * (len(made.response[0]) - 1)


def test_few_texts_are_in_memory_at_a_time(context, monkeypatch):
    monkeypatch.setattr(token_scores, "TEXTS_AT_ONCE", 3)
    ctx = context()
    texts = (Scored(row, 10, np.arange(2), np.array([5, row]), np.array([row, 0.5])) for row in range(8))
    write_token_scores(texts, ctx)
    file = pq.ParquetFile(ctx.selection / "token_scores.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [6, 6, 4]
    columns = written(ctx)
    assert columns["id"] == [row for row in range(8) for _ in range(2)] and columns["position"] == [10, 11] * 8
    assert columns["token"][1::2] == [ctx.scorer.tokenizer.decode([row]) for row in range(8)]
    assert [path.name for path in ctx.selection.iterdir()] == ["token_scores.parquet"]


def test_a_scorer_that_fails_midway_leaves_no_file(context):
    def texts():
        yield Scored(0, 0, np.arange(1), np.arange(1), np.zeros(1))
        raise KeyboardInterrupt

    ctx = context()
    with pytest.raises(KeyboardInterrupt):
        write_token_scores(texts(), ctx)
    assert not list(ctx.selection.iterdir())


def test_explain_shows_them(tiny_dir, rows_file, tmp_path, capsys):
    """Also from the stage cache, and beside the weights of a token policy."""
    for name in ("one", "again"):
        out = tmp_path / name
        words = [f"model.path={tiny_dir}", f"data.path={rows_file}", "budget=5", f"out={out}", "select.copies=2"]
        assert cli.entry(["select", "recipe=tshirt", *words]) == 0, capsys.readouterr().err
        capsys.readouterr()
        assert cli.entry(["select", "explain", f"run={out}", "id=3", "--json"]) == 0
        found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["methods"]["tshirt"]["token_scores"]
        assert len(found) > 1 and found[0].keys() == {"position", "token", "score", "weight"}
        assert "".join(token["token"] for token in found).endswith(" 3")
    assert cli.entry(["select", "explain", f"run={out}", "id=3"]) == 0
    assert "token scores: ' " in capsys.readouterr().out
