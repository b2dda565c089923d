"""Token weights of another run: the same where the tokens are the same, refused where they are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import ftrun
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError, FtrunError
from ftrun.tokens.reuse import read_tokens, write_origin
from ftrun.tokens.run import write_tokens


@pytest.fixture
def stored(table, context, tmp_path):
    """A run that has weighed ``table``; its scores and weights."""
    random = np.random.default_rng(0)
    scores, weights = random.normal(size=len(table.input_ids)), random.random(len(table.input_ids)).astype(np.float32)
    ctx = context()
    write_tokens(tmp_path / "run/selection/tokens.parquet", table.with_weights(weights), scores)
    write_origin(tmp_path / "run/selection", ctx)
    return ctx, str(tmp_path / "run"), scores, weights


def test_all_rows_some_rows_and_pieces(table, stored):
    ctx, run, scores, weights = stored
    whole = read_tokens(run, table, ctx)
    np.testing.assert_array_equal(whole.scores, scores)
    np.testing.assert_allclose(whole.weights, weights)
    some = np.array([7, 2, 11])
    part = read_tokens(run, table.rows(some), ctx)
    np.testing.assert_allclose(part.weights, table.with_weights(weights).rows(some).loss_weight)


def test_pieces_of_a_text(tmp_path, context):
    """The token that a piece repeats has no line of its own and no weight."""
    ids = np.arange(20, 30, dtype=np.int32)
    pieces = [Sequence(ids[:6], np.ones(6, np.float32), 4), Sequence(ids[5:], np.ones(5, np.float32), 4)]
    table, ctx = TokenTable.from_sequences(pieces), context()
    weights = np.arange(11, dtype=np.float32)
    write_tokens(tmp_path / "run/selection/tokens.parquet", table.with_weights(weights), weights.astype(float))
    write_origin(tmp_path / "run/selection", ctx)
    found = read_tokens(str(tmp_path / "run"), table, ctx).weights
    np.testing.assert_array_equal(np.delete(found, 6), np.delete(weights, 6))
    assert found[6] == 0


def test_other_tokens_rows_and_lengths_are_refused(table, stored):
    ctx, run, _, _ = stored
    changed = TokenTable(table.input_ids.copy(), table.loss_weight, table.offsets, table.record, table.label)
    changed.input_ids[30] += 1
    row = table.record[np.searchsorted(table.offsets, 30, side="right") - 1]
    with pytest.raises(DataError, match=f"row {row} differs"):
        read_tokens(run, changed, ctx)
    strange = TokenTable(table.input_ids, table.loss_weight, table.offsets, table.record + 500, table.label)
    with pytest.raises(DataError, match="not for these tokens"):
        read_tokens(run, strange, ctx)
    short = TokenTable.from_sequences(
        [Sequence(s.input_ids[:-1], s.loss_weight[:-1], s.record) for s in [table.sequence(3)]]
    )
    with pytest.raises(DataError, match="more tokens there"):
        read_tokens(run, short, ctx)
    with pytest.raises(ConfigError, match="holds no token weights"):
        read_tokens(run + "/nowhere", table, ctx)


def run(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> None:
    quick = ["data.heldout=0", "train.batch_size=4", "train.max_steps=2", "eval=[]", "data.max_length=256"]
    words = ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *quick, *more]
    ftrun.run("train", overrides=words)


def test_a_run_takes_the_weights_of_another(tiny_dir, reference_dir, rows_file, tmp_path):
    clean = ["tokens=token_cleaning", f"tokens.reference={reference_dir}", "tokens.k=0.3"]
    run(tiny_dir, rows_file, tmp_path / "a", *clean)
    first = pq.read_table(tmp_path / "a/selection/tokens.parquet")
    assert json.loads((tmp_path / "a/selection/tokens.json").read_text())["methods"] == ["token_cleaning"]
    for name, more in {"b": [], "c": ["tokens=token_cleaning"], "d": ["tokens=talr"]}.items():
        run(tiny_dir, rows_file, tmp_path / name, f"tokens.from={tmp_path / 'a'}", *more)
        assert pq.read_table(tmp_path / name / "selection/tokens.parquet").equals(first)
    losses = {
        name: [json.loads(line)["loss"] for line in (tmp_path / name / "train/metrics.jsonl").open()] for name in "abcd"
    }
    assert losses["a"] == losses["b"] == losses["c"] and losses["a"] != losses["d"]
    with pytest.raises(FtrunError, match=r"not for these tokens: row . differs, and so does the template"):
        run(tiny_dir, rows_file, tmp_path / "e", f"tokens.from={tmp_path / 'a'}", "model.template=alpaca")
    with pytest.raises(DataError, match=r"made with data.train_on=responses, and this run trains other tokens"):
        run(tiny_dir, rows_file, tmp_path / "g", f"tokens.from={tmp_path / 'a'}", "data.train_on=all")
    other = tmp_path / "other.jsonl"
    other.write_text(rows_file.read_text().replace("plus", "less"))
    with pytest.raises(FtrunError, match=r"not for these tokens: row . differs, and so does the data"):
        run(tiny_dir, other, tmp_path / "f", f"tokens.from={tmp_path / 'a'}")


def test_what_the_other_run_did_not_remember_is_made(tiny_dir, reference_dir, rows_file, tmp_path):
    """Weights come from there; a method that remembers asks its model here, whatever else was remembered there."""
    pear = [f"tokens.pear.behaviour={reference_dir}"]
    forget = [f"tokens.forgetting_sft.reference={reference_dir}"]
    run(tiny_dir, rows_file, tmp_path / "a", "tokens=forgetting_sft", f"tokens.reference={reference_dir}")
    taken = f"tokens.from={tmp_path / 'a'}"
    run(tiny_dir, rows_file, tmp_path / "b", "tokens=[forgetting_sft,pear]", *forget, *pear, taken)
    run(tiny_dir, rows_file, tmp_path / "c", "tokens=[forgetting_sft,pear]", *forget, *pear)
    assert pq.read_table(tmp_path / "b/selection/tokens.parquet").equals(
        pq.read_table(tmp_path / "c/selection/tokens.parquet")
    )
    with pytest.raises(ConfigError, match="made by forgetting_sft, not by token_cleaning"):
        both = ["tokens=[forgetting_sft,token_cleaning]", f"tokens.token_cleaning.reference={reference_dir}"]
        run(tiny_dir, rows_file, tmp_path / "d", *both, *forget, taken)
