"""Every recipe through the real command line for a few steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from composed import as_shipped
from recipe_words import extra, overrides_for, trains

from ftrun import cli
from ftrun.config import recipes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", sorted(filter(trains, recipes.catalogue())))
def test_recipe_trains(name, rows_for, tiny_dir, tiny_encoder_dir, tmp_path, capsys):
    """Selection and three steps end with chosen rows, a finite loss, something saved, and the files of the contract."""
    out = tmp_path / "run"
    code = cli.entry(["train", *overrides_for(name, rows_for, tiny_dir, tiny_encoder_dir, out), "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    summary = json.loads(printed.out.strip().splitlines()[-1])
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["status"] == "done" and summary["steps"] == 3 and summary["tokens"] > 0
    assert math.isfinite(summary["final_loss"]) and summary["trainable_parameters"] > 0
    assert (out / "adapter").is_dir() or (out / "model").is_dir()
    assert not list(out.rglob("*.bin")) and not list(out.rglob("*.pt"))
    for file in ("config.yaml", "lock.json", "report.html", "ftrun.log", "train/metrics.jsonl", "eval/results.json"):
        assert (out / file).is_file(), file
    lines = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "memory_bytes"} <= steps[0].keys()
    if selects(name):
        check_selection(out, most=12)


@pytest.mark.parametrize("name", sorted(name for name in recipes.catalogue() if not trains(name)))
def test_recipe_evaluates(name, rows_for, tiny_dir, tiny_encoder_dir, tmp_path, capsys):
    """A recipe that trains nothing ends with numbers of every evaluator that it names."""
    out = tmp_path / "run"
    code = cli.entry(["train", *overrides_for(name, rows_for, tiny_dir, tiny_encoder_dir, out), "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    summary = json.loads(printed.out.strip().splitlines()[-1])
    assert summary["status"] == "done" and summary["steps"] == 0
    results = json.loads((out / "eval/results.json").read_text())
    assert results.keys() == {evaluator for evaluator, _ in as_shipped(name).settings.eval}
    assert all(metrics for metrics in results.values())
    for file in ("config.yaml", "lock.json", "report.html", "ftrun.log"):
        assert (out / file).is_file(), file
    if selects(name):
        check_selection(out, most=12)


def selects(name: str) -> bool:
    recipe = recipes.find(name)
    return (recipe.choice("select"), recipe.choice("picker")) != ("none", "own")


def check_selection(out: Path, most: int) -> list[int]:
    """Scores and chosen rows have the contract's columns and agree; the places of the chosen rows."""
    table = pq.read_table(out / "selection/scores.parquet").to_pydict()
    rows = [json.loads(line) for line in (out / "selection/selected.jsonl").read_text().splitlines()]
    assert table["id"] == sorted(set(table["id"]))
    assert 0 < len(rows) <= most
    assert {row["id"] for row in rows} == {
        i for i, chosen in zip(table["id"], table["selected"], strict=True) if chosen
    }
    assert sum(table["selected"]) == len(rows)
    assert sorted(rank for rank in table["rank"] if rank is not None) == list(range(1, len(rows) + 1))
    return [row["id"] for row in rows]


@pytest.mark.parametrize("name", ["superfiltering", "dac_iter", "less"])  # scores, rounds of training, gradients
def test_select_chooses_the_same_rows_twice(name, rows_for, tiny_dir, tmp_path, capsys, monkeypatch):
    """`ftrun select` alone, of all rows, and with nothing to reuse of the first time."""
    picked = []
    for attempt in ("one", "two"):
        monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / f"cache-{attempt}"))
        out = tmp_path / attempt
        words = [f"recipe={name}", f"model.path={tiny_dir}", f"data.path={rows_for['sft']}", "budget=5", f"out={out}"]
        assert cli.entry(["select", *words, *extra(name, tiny_dir)]) == 0, capsys.readouterr().err
        picked.append(check_selection(out, most=5))
        assert pq.read_table(out / "selection/scores.parquet")["id"].to_pylist() == list(range(24))
        assert not (out / "train").exists() and not (out / "eval").exists()
    assert picked[0] == picked[1]
