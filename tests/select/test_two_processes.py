"""Selections that train on the way choose the same rows with two processes as with one."""

from __future__ import annotations

import json

import pytest

from ftrun import cli

CASES = {
    "dac_iter": ["select.picker.max_new_tokens=8", "select.picker.clusters=3", "select.picker.learning_rate=1e-2"],
    "less": [
        "select.queries=[{queries}]",
        "select.warmup_rows=0.5",
        "select.batch_size=4",
        "select.learning_rate=1e-2",
        "select.lora_dropout=0",  # what is dropped is drawn by process
    ],
    "ifd": ["select.warmup=8", "select.warmup_clusters=4", "select.warmup_learning_rate=1e-2"],
    "igf": ["objective=sft", "data.max_length=128", "select.learner_rate=1e-2", "select.probes=12"],
}


@pytest.mark.parametrize("recipe", CASES)
@pytest.mark.slow
def test_the_same_choice(recipe, tiny_dir, rows, rows_file, tmp_path, monkeypatch, capsys):
    queries, chosen = tmp_path / "queries.jsonl", []
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows[3:7]))
    for processes in (1, 2):
        monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / f"cache{processes}"))  # or the first choice would be reused
        out = tmp_path / f"run{processes}"
        words = [f"recipe={recipe}", f"model.path={tiny_dir}", f"data.path={rows_file}", "budget=9", f"out={out}"]
        words += [word.format(queries=queries) for word in CASES[recipe]]
        words += [f"launch.processes={processes}", "launch.threads=1"]
        assert cli.entry(["select", *words]) == 0, capsys.readouterr().err
        assert "reused" not in (out / "ftrun.log").read_text()
        chosen.append([json.loads(line)["id"] for line in (out / "selection/selected.jsonl").read_text().splitlines()])
        assert not (out / "selection/shards").exists()
    assert chosen[0] == chosen[1] and len(chosen[0]) == 9
