"""The report of whole, broken and nearly empty run folders."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_up_run import make
from pyarrow import parquet
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ftrun.reporting.html import write_report
from ftrun.reporting.run import Run

VOID = {"meta", "br", "hr", "wbr"}
EVIL = '<script>alert("x")</script> & "quoted" <b>'


class Page(HTMLParser):
    """A strict reader: every element is closed, in order; no unescaped text can open one."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"attribute twice in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def report(folder: Path) -> tuple[Page, str]:
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Page, str]:
    return report(make(tmp_path_factory.mktemp("run")))


def test_whole_run_has_every_section(whole):
    page, _ = whole
    wanted = ["Warnings", "Key numbers", "Training", "Selection", "Token weights", "Predictions"]
    assert page.headings == [*wanted, "Differences from the paper", "Run it again", "Environment"]
    for words in ("qlora_sft", "reference-checked", "Dettmers et al.", "7 min 12 s", "461k of 135M (0.34%)", "2.41 GB"):
        assert words in page.text
    assert "ftrun train recipe=qlora_sft select=superfiltering budget=0.25 tokens=token_cleaning" in page.text
    assert "step 97: the gradient norm is not finite" in page.text
    assert re.search(r"\d+ became right, \d+ became wrong", page.text)


def test_page_is_self_contained(whole):
    """Nothing is fetched: links lead to the paper only, and there is no script."""
    page, text = whole
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == ["https://arxiv.org/abs/2305.14314"]
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object")]
    assert not [attrs for _, attrs in page.tags if "src" in attrs or any(name.startswith("on") for name in attrs)]
    assert "@import" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_direction_of_change_follows_the_metric(whole):
    _page, text = whole
    row = {
        name: text[text.index(f'scope="row">{name}<') :][:900]
        for name in ("loss", "exact match", "accuracy", "mean length")
    }
    assert "▼ −1.263" in row["loss"] and "better" in row["loss"]
    assert "▲ +0.344" in row["exact match"] and "better" in row["exact match"]
    assert "within noise" in row["accuracy"] and "changed" in row["mean length"]


def test_nan_does_not_break_plots(tmp_path):
    """A gap and a mark, finite coordinates everywhere; even when nothing is finite."""
    folder = make(tmp_path / "a")
    page, text = report(folder)
    assert "× 1 not finite" in page.text and "step 97: not a finite number" in text
    for lines in (
        [{"step": s, "loss": math.nan, "grad_norm": None, "lr": "NaN"} for s in range(1, 6)],
        [{"step": 1, "loss": 2.0, "lr": 0.0, "tokens_per_s": math.inf}],
        [{"step": s, "loss": 1.0, "lr": 1e-4} for s in range(1, 4)],
        [{"step": 5, "eval_loss": 1.5}],
    ):
        (folder / "train/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        page, _ = report(folder)
        assert "Training" in page.headings
        assert_coordinates_are_finite(page)


def assert_coordinates_are_finite(page: Page) -> None:
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            if name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height", "d", "viewbox"):
                assert not re.search("nan|inf", value or "", re.IGNORECASE), f"<{tag} {name}={value}>"


def test_coordinates_of_the_whole_run_are_finite(whole):
    assert_coordinates_are_finite(whole[0])


def test_empty_folder_and_early_failure(tmp_path):
    page, _ = report(tmp_path)
    assert page.headings == ["This run did not finish"]
    summary = {
        "recipe": "lora_sft",
        "status": "failed",
        "error": {"what": "row 3 is empty", "message": f"row 3 {EVIL}"},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "ftrun.log").write_text("2026-03-01 10:00:00  == Select  ifd\n")
    page, text = report(tmp_path)
    assert page.headings == ["This run failed"]
    assert EVIL in page.text and "<script" not in text and "== Select" in page.text


def test_text_of_users_is_escaped(tmp_path):
    """Markup in data, predictions, names, log and config comes out as text."""
    folder = make(tmp_path)
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "recipe": EVIL,
                "differences": [EVIL],
                "paper": {"title": EVIL, "url": "javascript:alert(1)"},
                "adapter": {"name": EVIL},
            }
        )
    )
    (folder / "ftrun.log").write_text(f"2026-03-01 10:00:00  warning: {EVIL}\n")
    (folder / "lock.json").write_text(json.dumps({"command": ["train", f"prompt={EVIL}"], EVIL: EVIL}))
    (folder / "summary.json").write_text(json.dumps({"recipe": EVIL, "status": EVIL}))
    rows = [{"id": i, "instruction": EVIL, "output": EVIL + "\x00\x1b[0m \ud800"} for i in range(600)]
    (folder / "selection/selected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval/predictions/generation.jsonl").write_text(
        json.dumps({"id": EVIL, "prompt": EVIL, "output": EVIL, EVIL: EVIL}) + "\n"
    )
    (folder / "eval/results.json").write_text(json.dumps({EVIL: {EVIL: {"value": 1.0, "stderr": None, "n": 3}}}))
    page, text = report(folder)
    assert "<script" not in text and "<b>" not in text
    assert not [attrs for tag, attrs in page.tags if "javascript" in (attrs.get("href") or "")]
    assert page.text.count(EVIL) > 20


def test_what_cannot_be_read_is_named(tmp_path):
    folder = make(tmp_path)
    (folder / "selection/scores.parquet").write_bytes(b"not parquet")
    (folder / "lock.json").write_text("{")
    with (folder / "train/metrics.jsonl").open("a") as lines:
        lines.write('{"step": 241, "lo')
    page, _ = report(folder)
    assert "Selection" not in page.headings and "Training" in page.headings
    for name in ("selection/scores.parquet", "lock.json", "train/metrics.jsonl: line 247"):
        assert f"not readable, left out here: {name}" in page.text


def test_resumed_run_counts_the_later_line(tmp_path):
    (tmp_path / "train").mkdir()
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_loss": 9.0},
    ]
    (tmp_path / "train/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run(tmp_path)
    steps, loss = run.series("loss")
    assert steps.tolist() == [1, 2] and loss.tolist() == [3.0, 1.0]
    assert run.series("eval_loss")[1].tolist() == [9.0]


def test_token_ids_are_spelled_by_the_saved_tokenizer(tmp_path):
    """tokens.parquet holds ids; without a tokenizer in the run folder they are shown bare."""
    folder = make(tmp_path)
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "▁hello": 1, EVIL: 2}, unk_token="<unk>"))
    columns = {
        "id": [5, 5, 5],
        "position": [0, 1, 2],
        "token": [1, 2, 9],
        "score": [1.0, 2.0, 3.0],
        "weight": [0.0, 1.0, 0.5],
    }
    parquet.write_table(pa.table(columns), folder / "selection/tokens.parquet")
    assert "⟨1⟩⟨2⟩⟨9⟩" in report(folder)[0].text
    (folder / "adapter").mkdir()
    tokenizer.save(str(folder / "adapter/tokenizer.json"))
    assert f"hello{EVIL}⟨9⟩" in report(folder)[0].text


def test_best_rows_are_shown_with_text(whole):
    page, _text = whole
    assert page.text.index("Best of the choice") < page.text.index("Around the cut") < page.text.index("Lowest scores")
    assert "Left out although they score higher" in page.text, "rows above the filter of the method"
    best = page.text[page.text.index("Best of the choice") : page.text.index("Around the cut")]
    scores = [float(s) for s in re.findall(r"(0\.9\d+)(?=picked)", best)]
    assert len(scores) == 10 and scores == sorted(scores, reverse=True) and np.all(np.array(scores) < 1)
