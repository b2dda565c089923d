"""Tables, changes and numbers."""

from __future__ import annotations

import io
import json
import math

import pytest
from made_up_run import make
from rich.console import Console

from ftrun.reporting.changes import changes
from ftrun.reporting.gain import gain
from ftrun.reporting.html import render
from ftrun.reporting.run import Run
from ftrun.reporting.terminal import before_after_table, final_table, results_table
from ftrun.runs import numbers
from ftrun.runs.progress import Reporter


def printed(renderable, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def entry(value, stderr=None, n=10, **more):
    return {"value": value, "stderr": stderr, "n": n, **more}


def test_final_table(tmp_path):
    folder = make(tmp_path)
    (folder / "report.html").write_text("")
    for width in (80, 100):
        text = printed(final_table(folder), width)
        loss = next(line for line in text.splitlines() if line.startswith("heldout loss"))
        assert loss.split() == [
            "heldout",
            "loss",
            "1.934",
            "±",
            "0.041",
            "0.671",
            "±",
            "0.029",
            "▼",
            "−1.263",
            "better",
        ]
        assert "within noise" in text
    assert str(folder / "report.html") in printed(final_table(folder), 300)
    assert "240 steps · 355k tokens · 7 min 12 s · 2.41 GB at most" in text


def test_results_without_before_have_one_value(tmp_path):
    (tmp_path / "eval").mkdir()
    assert before_after_table(tmp_path) is None
    (tmp_path / "eval/results.json").write_text(json.dumps({"heldout": {"loss": entry(1.25, 0.05)}}))
    stream = io.StringIO()
    results_table(tmp_path, Reporter(stream=stream, live=False))
    assert "heldout loss  1.250 ± 0.050" in stream.getvalue() and "before" not in stream.getvalue()


@pytest.mark.parametrize(
    ("metric", "before", "after", "verdict"),
    [
        ("loss", entry(2.0, 0.1), entry(1.0, 0.1), "better"),
        ("loss", entry(1.0, 0.1), entry(2.0, 0.1), "worse"),
        ("accuracy", entry(0.4, 0.01), entry(0.5, 0.01), "better"),
        ("accuracy", entry(0.50, 0.05), entry(0.55, 0.05), "within noise"),
        ("accuracy", entry(0.5), entry(0.5), "same"),
        ("accuracy", entry(0.50), entry(0.51), "better"),  # no standard error: the plain comparison
        ("strange", entry(1, higher_is_better=False), entry(2, higher_is_better=False), "worse"),
        ("mean_length", entry(10), entry(20), "changed"),
        ("loss", entry(None), entry(1.0), ""),
        ("loss", None, entry(1.0), ""),
    ],
)
def test_verdicts(metric, before, after, verdict):
    (change,) = changes({"e": {metric: before}}, {"e": {metric: after}})
    assert change.verdict == verdict


def test_stderr_of_a_change_adds_both_sides():
    (change,) = changes({"e": {"a": entry(1.0, 0.3)}}, {"e": {"a": entry(2.0, 0.4)}})
    assert change.stderr == pytest.approx(0.5) and change.delta == 1.0


def test_numbers():
    assert [numbers.duration(s) for s in (0.04, 9.99, 59.7, 192, 7500, 200_000)] == [
        "0.0 s", "10 s", "1 min 00 s", "3 min 12 s", "2 h 05 min", "2 d 7 h",
    ]  # fmt: skip
    assert [numbers.size(b) for b in (12, 2_412_000_000, 999_900)] == ["12 B", "2.41 GB", "1.00 MB"]
    assert [numbers.quantity(q) for q in (987, 12_400, 134_515_008, math.nan)] == ["987", "12.4k", "135M", "?"]
    assert numbers.pair(1.9342, 0.0412) == ("1.934", "0.041") and numbers.pair(96.2, 8.1) == ("96.2", "8.1")
    assert numbers.pair(0.5, None) == ("0.5000", "") and numbers.plain(math.nan) == "NaN"
    assert numbers.field("loss", 1.23456) == "loss 1.2346" and numbers.field("lr", 2e-4) == "lr 2.00e-04"


HOW = "by training 0.34% of the parameters beside weights in 4 bits for 240 steps on 150 of 600 rows chosen by superfiltering."


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (
            {"generation": {"accuracy": entry(0.12, 0.03, 96)}, "heldout": {"loss": entry(1.42, 0.04, 96)}},
            {"generation": {"accuracy": entry(0.61, 0.05, 96)}, "heldout": {"loss": entry(0.31, 0.04, 96)}},
            "Accuracy on 96 held-out rows rose from 12% to 61% (beyond the interval), "
            "held-out loss fell from 1.420 to 0.310 (beyond the interval), ",
        ),
        (
            {"heldout": {"perplexity": entry(4, 1), "loss": entry(1.4, 0.1)}},
            {"heldout": {"perplexity": entry(5, 1), "loss": entry(1.5, 0.1)}},
            "No gain beyond the interval: held-out loss went from 1.40 to 1.50 (within the interval), ",
        ),
        (
            {"heldout": {"loss": entry(1.0, 0.1)}, "lm_eval": {"acc": entry(0.5)}},
            {"heldout": {"loss": entry(2.0, 0.1)}, "lm_eval": {"acc": entry(0.5)}},
            "No gain beyond the interval: lm eval acc (n = 10) stayed at 50%, "
            "held-out loss rose from 1.00 to 2.00 (beyond the interval, which is worse), ",
        ),
        ({}, {"heldout": {"loss": entry(2.0, 0.1)}}, None),
    ],
)
def test_one_sentence_says_what_was_gained(tmp_path, before, after, sentence):
    folder = make(tmp_path)
    for file in (folder / "eval/predictions").rglob("*.jsonl"):
        file.unlink()  # the values below speak for themselves
    for name, results in (("before", before), ("results", after)):
        (folder / f"eval/{name}.json").write_text(json.dumps(results))
    assert gain(Run(folder)) == (sentence + HOW if sentence else "")


def test_the_sentence_stands_in_table_and_page_and_says_what_it_knows(tmp_path):
    folder = make(tmp_path)
    said = gain(Run(folder))
    assert said.endswith(HOW) and said in printed(final_table(folder), 1000) and said in render(Run(folder))
    (folder / "config.yaml").write_text("quant: {name: none}")
    (folder / "selection/summary.json").unlink()
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"trainable_parameters": 7, "total_parameters": 7}))
    assert gain(Run(folder)).endswith(", by training all parameters for 240 steps.")
    (folder / "summary.json").write_text(json.dumps(summary | {"steps": 0}))
    assert gain(Run(folder)) == ""
