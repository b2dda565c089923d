"""Sweeps: a folder a job, a table at the end, and an exit code that tells of a job that failed."""

from __future__ import annotations

import json

import pytest

from ftrun import cli
from ftrun.errors import ConfigError
from ftrun.verbs.sweep import Sweep

QUICK = ["data.heldout=0.2", "data.max_length=128", "train.max_steps=1", "train.eval_before=false"]


def test_one_out_is_a_folder_a_job(tiny_dir, rows_file, tmp_path, monkeypatch, capsys):
    """The jobs that work end in the table with their losses; one that fails is named there, and nothing stops for it."""
    monkeypatch.chdir(tmp_path)
    paths = f"data.path={rows_file},{tmp_path / 'missing.jsonl'}"
    words = ["recipe=lora_sft", f"model.path={tiny_dir}", paths, f"out={tmp_path / 's'}", *QUICK]
    assert cli.entry(["train", "-m", *words]) == 3
    table = capsys.readouterr().err.split("sweep: 2 jobs, 1 failed")[1]
    summary = json.loads((tmp_path / "s/0/summary.json").read_text())
    assert f"{summary['final_loss']:.4g}" in table and f"{summary['metrics']['heldout']['loss']:.4g}" in table
    assert "done" in table and "job 1 failed: " in table and "missing.jsonl" in "".join(table.split())
    jobs = json.loads((tmp_path / "s/sweep.json").read_text())
    assert [job["exit_code"] for job in jobs] == [0, 3] and jobs[0]["out"] == str(tmp_path / "s/0")
    assert [len(job["changes"]) for job in jobs] == [1, 1] and str(rows_file) in jobs[0]["changes"][0]
    assert cli.entry(["train", "-m", *words]) == 2
    assert "already holds runs" in capsys.readouterr().err


def test_an_out_that_is_swept_itself_stays(tmp_path):
    assert Sweep.of(["out=a,b", "seed=0,1"]).out is None
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="already holds runs"):
        Sweep.of([f"out={tmp_path}", "seed=0,1"])
