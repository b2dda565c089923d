"""The log of token weights: counted right, and the same however a step is cut or shared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ftrun
from ftrun.training.weightlog import EXAMPLES, PARTS, shares


def test_places_in_a_sequence():
    found = shares(np.array([1, 1, 1, 1, 0, 0]))
    np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.75, 0, 0.5])


def lines(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[dict]:
    quick = ["data.heldout=0", "data.max_length=256", "train.batch_size=6", "train.max_steps=3", "eval=[]"]
    words = ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *quick, *more]
    ftrun.run("train", overrides=words)
    return [json.loads(line) for line in (out / "train/token_weights.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_counts_agree_with_each_other_and_with_the_cut(tiny_dir, rows_file, tmp_path):
    one = lines(tiny_dir, rows_file, tmp_path / "a", "tokens=talr")
    assert [line["step"] for line in one] == [1, 2, 3]
    for line in one:
        assert sum(part["tokens"] for part in line["parts"]) == line["tokens"] and len(line["parts"]) == PARTS
        assert sum(kind["kept"] for kind in line["classes"].values()) == line["kept"] == sum(line["histogram"])
        total = sum(kind["mean"] * kind["tokens"] for kind in line["classes"].values())
        assert total / line["tokens"] == pytest.approx(line["mean"])
    for name, more in {"b": "train.batch_tokens=1", "c": "train.packing=true", "d": "launch.processes=2"}.items():
        other = lines(tiny_dir, rows_file, tmp_path / name, "tokens=talr", more)
        assert [line["tokens"] for line in other] == [line["tokens"] for line in one]
        np.testing.assert_allclose([line["mean"] for line in other], [line["mean"] for line in one], rtol=1e-4)
        for ours, theirs in zip(one, other, strict=True):
            assert [example["token"] for example in ours["heaviest"]] == [e["token"] for e in theirs["heaviest"]]


def test_the_heaviest_and_the_lightest_tokens_stand_in_their_rows(tiny_dir, rows_file, tmp_path):
    (line, *_) = lines(tiny_dir, rows_file, tmp_path / "a", "tokens=talr")
    texts = [json.loads(row)["output"] for row in rows_file.read_text().splitlines()]
    for examples, sign in ((line["heaviest"], -1), (line["lightest"], 1)):
        assert 1 <= len(examples) <= EXAMPLES
        factors = [sign * one["factor"] for one in examples]
        assert factors == sorted(factors)
        for one in examples:
            row = f"{texts[one['row']]}<|im_end|>"
            assert row in one["before"] + one["token"] + one["after"] or one["token"] in row
    assert line["lightest"][0]["factor"] <= line["mean"] <= line["heaviest"][0]["factor"]


def test_plain_training_writes_none(tiny_dir, rows_file, tmp_path):
    with pytest.raises(FileNotFoundError):
        lines(tiny_dir, rows_file, tmp_path / "a")
