"""Token cleaning that makes its own references, chunk by chunk, while it trains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import ftrun
from ftrun.data.batches import Plan
from ftrun.errors import CheckpointError, ConfigError, DataError
from ftrun.tokens.policies.token_cleaning import TokenCleaning
from ftrun.training.loop import Trainer

ROUNDS = ["tokens=token_cleaning", "tokens.mode=self_evolving"]
QUICK = ["eval=[]", "data.heldout=0", "optim.learning_rate=1e-2", "schedule=constant", "launch.threads=1"]


def words(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[str]:
    return ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *QUICK, *more]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train/metrics.jsonl").read_text().splitlines()]


def tokens(out: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(out / "selection/tokens.parquet")
    return {name: table[name].to_numpy() for name in table.schema.names}


def test_rows_come_chunk_by_chunk():
    chunk = TokenCleaning(mode="self_evolving", rounds=3).order(range(10))
    assert chunk.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    plan = Plan.of(10, 3, 2.0, None, 0, chunk)
    drawn = np.concatenate([plan.step(step) for step in range(plan.steps)])[:20].reshape(2, 10)
    for epoch in drawn:
        assert (np.diff(chunk[epoch]) >= 0).all() and sorted(epoch) == list(range(10))
    assert drawn[0].tolist() != list(range(10)) and drawn[0].tolist() != drawn[1].tolist()
    assert TokenCleaning().order(range(10)) is None


def test_a_round_scores_with_the_model_of_the_round_before(tiny_dir, rows_file, rows, tmp_path, bundle, plain_losses):
    """theta_0 made by a run of its own over the first chunk gives the same scores for the second."""
    from transformers import AutoModelForCausalLM

    from ftrun.config.settings import DataConfig
    from ftrun.data.pool import load_pool
    from ftrun.data.prepare import prepare

    first = tmp_path / "first.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    full = ("adapter=none", "train.batch_size=12")
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "all", *ROUNDS, "tokens.rounds=2", *full))
    ftrun.run("train", overrides=words(tiny_dir, first, tmp_path / "theta0", *full))
    theta = AutoModelForCausalLM.from_pretrained(tmp_path / "theta0" / "model").eval()
    table = prepare(
        load_pool(DataConfig(path=str(rows_file)), tmp_path / "work", 0),
        bundle.tokenizer,
        DataConfig(),
        context_length=512,
        vocab_size=384,
        folder=tmp_path / "tokens",
    ).table
    base, now = plain_losses(table), plain_losses(table, theta)
    expected = np.concatenate([base[row] - now[row] for row in range(12, 24)])
    found = tokens(tmp_path / "all")
    later = found["id"] >= 12
    scored = later & ~np.isnan(found["score"])
    assert np.isnan(found["score"][~later]).all() and np.ptp(expected) > 0.01
    np.testing.assert_allclose(found["score"][scored], expected, atol=2e-4)
    assert (found["weight"][scored] > 0).sum() == int(0.6 * scored.sum())
    kept, left = found["score"][scored & (found["weight"] > 0)], found["score"][scored & (found["weight"] == 0)]
    assert kept.min() >= left.max()


def test_every_chunk_keeps_its_share(tiny_dir, rows_file, tmp_path):
    more = ("tokens.rounds=4", "tokens.k=0.3", "train.batch_size=3")
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "a", *ROUNDS, *more))
    found = tokens(tmp_path / "a")
    for chunk in range(4):
        mine = found["id"] // 6 == chunk
        scored = mine & ~np.isnan(found["score"])
        assert scored.any() == (chunk > 0)
        assert chunk == 0 or (found["weight"][mine] > 0).sum() == int(0.3 * scored.sum())
    whole = [json.loads(line) for line in (tmp_path / "a/train/metrics.jsonl").read_text().splitlines()]
    assert len(whole) == 8
    assert sorted(f.name for f in (tmp_path / "a/selection/rounds").iterdir()) == [f"round-{i}.npy" for i in (1, 2, 3)]


def test_keeping_everything_is_plain_training_in_chunks(tiny_dir, rows_file, tmp_path, monkeypatch):
    more = ("tokens.rounds=3", "train.batch_size=8")
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "a", *ROUNDS, "tokens.k=1", *more))
    plain = Plan.of

    def in_chunks(*args, **kwargs):
        plan = plain(*args, **kwargs)
        plan.part = np.arange(24) // 8
        return plan

    monkeypatch.setattr(Plan, "of", in_chunks)
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "b", "train.batch_size=8"))
    np.testing.assert_array_equal(losses(tmp_path / "a"), losses(tmp_path / "b"))


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_killed_run_goes_on(at, tiny_dir, rows_file, tmp_path, monkeypatch):
    """Killed before, at and inside a round that begins with step 4; losses and choices are the same to the bit."""
    more = (*ROUNDS, "tokens.rounds=3", "train.batch_size=2", "train.save_steps=1")
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "whole", *more))
    cut = words(tiny_dir, rows_file, tmp_path / "cut", *more)
    step = Trainer._step

    def dies(self, number):
        if number == at:
            raise Killed
        return step(self, number)

    monkeypatch.setattr(Trainer, "_step", dies)
    with pytest.raises(Killed):
        ftrun.run("train", overrides=cut)
    monkeypatch.setattr(Trainer, "_step", step)
    ftrun.run("train", overrides=[*cut, f"resume={tmp_path / 'cut'}"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, values in tokens(tmp_path / "whole").items():
        np.testing.assert_array_equal(tokens(tmp_path / "cut")[name], values)


def test_a_round_whose_scores_are_gone_is_refused(tiny_dir, rows_file, tmp_path):
    more = words(
        tiny_dir, rows_file, tmp_path / "a", *ROUNDS, "tokens.rounds=2", "train.batch_size=4", "train.epochs=1"
    )
    ftrun.run("train", overrides=[*more, "train.save_steps=1", "train.keep_checkpoints=9"])
    import shutil

    for step in (5, 6):
        shutil.rmtree(tmp_path / f"a/train/checkpoints/step-{step:06d}")
    (tmp_path / "a/selection/rounds/round-1.npy").unlink()
    with pytest.raises(CheckpointError, match="gone"):
        ftrun.run(
            "train", overrides=[*more, "train.save_steps=1", "train.keep_checkpoints=9", f"resume={tmp_path / 'a'}"]
        )


def test_wrong_knobs_are_refused(table, context):
    with pytest.raises(ConfigError, match="makes its own references"):
        TokenCleaning(mode="self_evolving", reference="auto")
    with pytest.raises(ConfigError, match="at least 2"):
        TokenCleaning(rounds=1)
    with pytest.raises(DataError, match="12 rows cannot be cut into 13"):
        TokenCleaning(mode="self_evolving", rounds=13).precompute(table, context())


def test_rows_that_another_method_leaves_out_are_refused(table, context):
    """Its scores lie by the places of all tokens."""

    class Left:
        def __init__(self, rows):
            self.table, self.ctx, self.plan = rows, context("token_cleaning"), Plan.of(len(rows), 2, 1.0, None, 0)

    policy = TokenCleaning(mode="self_evolving", rounds=2)
    policy.precompute(table, context("token_cleaning"))
    with pytest.raises(ConfigError, match="leaves some of them out"):
        policy.before_step(0, Left(table.rows(np.arange(11))))  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny_dir, rows_file, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        more = (*ROUNDS, "tokens.rounds=3", "train.batch_size=8", f"launch.processes={processes}")
        overrides = words(tiny_dir, rows_file, tmp_path / out, *more)
        ftrun.run("train", overrides=overrides)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-4, atol=1e-4)
    one, two = tokens(tmp_path / "one"), tokens(tmp_path / "two")
    np.testing.assert_allclose(one["score"], two["score"], atol=1e-4)
