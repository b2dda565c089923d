"""The page of a selection, and the numbers on it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftrun.reporting.selection import write_selection_report
from ftrun.reporting.selection_facts import OTHERS, Choice, jaccard, jaccard_by_chance, read_choices, spearman
from ftrun.reporting.shares import pair_table, share_chart, shares_of

ROWS = 60


def make(folder, name="superfiltering", seed=0, column="ifd", sources=None):
    """Fill a selection's folder: 12 of 60 rows picked, 3 without a score, 5 filtered out."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    score = rng.random(ROWS)
    score[:3] = np.nan
    admitted = np.isfinite(score) & (np.arange(ROWS) >= 8)
    order = np.flatnonzero(admitted)[np.argsort(-score[admitted], kind="stable")]
    rank = np.zeros(ROWS, np.int64)
    rank[order[:12]] = np.arange(1, 13)
    ids = np.arange(ROWS)
    table = {column: score, "selected": rank > 0, "rank": pa.array(rank, mask=rank == 0)}
    pq.write_table(pa.table({"id": ids, **table}), folder / "scores.parquet")
    pq.write_table(pa.table({"id": ids, "tokens": 10 + ids}), folder / "lengths.parquet")
    reasons = ["<no response>"] * 3 + [None] * (ROWS - 3)
    audit = {
        "id": ids,
        "admitted": admitted,
        "random": np.arange(ROWS) % 5 == 0,
        "cluster": pa.array((ids % 3).tolist(), pa.int32()),
        "source": pa.array(sources or [None] * ROWS, pa.string()),
        "reason": pa.array(reasons, pa.string()),
    }
    pq.write_table(pa.table(audit), folder / "audit.parquet")
    lines = [{"id": int(i), "instruction": f"ask <{i}>", "output": f"say {i} & more"} for i in ids]
    (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "selected.jsonl").write_text("".join(json.dumps(lines[i]) + "\n" for i in order[:12]))
    summary = {"select": name, "picker": "own", "budget": 12, "column": column, "filtered": 5}
    summary["clusters"] = {"by": "hashed bag of words", "names": ["dogs", "cats", "birds"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(f"recipe: {name}\nseed: 0\nselect: {{name: {name}}}\n")


@pytest.fixture
def single(tmp_path):
    make(tmp_path / "selection")
    (tmp_path / "config.yaml").write_text("recipe: superfiltering\nseed: 0\n")
    return tmp_path


@pytest.fixture
def several(tmp_path):
    for number, name in enumerate(["superfiltering", "longest", "random"]):
        make(tmp_path / "selection" / name, name, number, column=name)
    (tmp_path / "config.yaml").write_text("recipe: superfiltering,longest,random\nseed: 0\n")
    return tmp_path


class Balance(HTMLParser):
    """Fails on tags that do not match."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "wbr", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def whole(path) -> str:
    page = path.read_text()
    parser = Balance()
    parser.feed(page)
    assert not parser.open
    assert "<script" not in page and "src=" not in page and "@import" not in page
    assert not re.search(r"nan|NaN", re.sub(r"<style>.*?</style>", "", page, flags=re.S))
    return page


def test_page_of_one_method(single):
    page = whole(write_selection_report(single))
    for heading in ("At a glance", "Scores", "Length", "Topics", "Rows to read", "Rows without a score"):
        assert f"<h2>{heading}</h2>" in page
    assert "Overlap" not in page and "<h2>Sources</h2>" not in page
    for group in ("Best of the choice", "Around the cut", "Lowest scores"):
        assert group in page
    assert "&lt;no response&gt;<span" in page and "hashed bag of words" in page
    assert "ask &lt;0&gt;" in page and "ask <0>" not in page
    assert "random 12" in page


def test_page_of_several_methods(several):
    page = whole(write_selection_report(several))
    assert page.index("<h2>superfiltering</h2>") < page.index("<h2>longest</h2>") < page.index("<h2>random</h2>")
    assert "Jaccard" in page and "Spearman" in page


def test_nothing_selected_gives_no_page(tmp_path):
    (tmp_path / "selection").mkdir()
    assert write_selection_report(tmp_path) is None


def test_twenty_rows_a_group(single):
    page = whole(write_selection_report(single))
    groups = dict(re.findall(r"<summary>([^<]+)<span class=\"muted\"> (\d+) rows</span>", page))
    assert groups == {
        "Best of the choice": "12",
        "Around the cut": "20",
        "Left out although they score higher": "2",
        "Lowest scores": "20",
        "&lt;no response&gt;": "3",
    }


def test_many_sources_are_joined(tmp_path):
    make(tmp_path / "selection", sources=[f"t0/task{i}" if i % 2 else "gsm8k" for i in range(ROWS)])
    groups = read_choices(tmp_path)[0].by_source()
    assert [group.name for group in groups] == ["gsm8k", "t0"]
    make(tmp_path / "selection", sources=[f"file{i}" for i in range(ROWS)])
    groups = read_choices(tmp_path)[0].by_source()
    assert groups[-1].name == OTHERS and sum(group.pool for group in groups) == pytest.approx(1)


def test_shares_add_up():
    group = np.array([0, 0, 0, 1, 1, 2])
    picked, random = np.array([1, 0, 0, 1, 0, 0], bool), np.array([0, 0, 0, 0, 0, 1], bool)
    found = shares_of(["a", "b", "c"], group, picked, random)
    assert [(one.pool, one.choice, one.random) for one in found] == [(0.5, 0.5, 0), (1 / 3, 0.5, 0), (1 / 6, 0, 1)]
    assert "50.0% of the pool" in share_chart(found, "shares")


def test_overlap_by_hand():
    one, other = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert jaccard(one, other) == pytest.approx(1 / 3)
    assert np.isnan(jaccard(~one & one, ~one & one))
    # two of four rows each, drawn at random, share one on average: 1 of 3
    assert jaccard_by_chance(2, 2, 4) == pytest.approx(1 / 3)


def test_spearman_agrees_with_scipy():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 6, 40).astype(float), rng.random(40)
    assert spearman(one, other) == pytest.approx(spearmanr(one, other)[0])
    one[3] = np.nan
    keep = np.arange(40) != 3
    assert spearman(one, other) == pytest.approx(spearmanr(one[keep], other[keep])[0])
    assert np.isnan(spearman(np.ones(40), other))


def test_facts_of_a_choice(single):
    choice: Choice = read_choices(single)[0]
    assert choice.follows_score and choice.cutoff == pytest.approx(np.min(choice.score[choice.picked]))
    assert {why: rows.tolist() for why, rows in choice.unscored().items()} == {"<no response>": [0, 1, 2]}


def test_tables_of_many_methods_number_their_columns():
    names = [f"method_{letter}" for letter in "abcdef"]
    table = str(pair_table(names, np.eye(6), "in common", lambda i, j: f"{names[i]} {names[j]}"))
    assert table.count(">method_") == 0 and ">6 method_f<" in table and ">6</th>" in table
    few = str(pair_table(names[:3], np.eye(3), "in common", lambda i, j: ""))
    assert few.count(">method_a<") == 2


def test_a_random_choice_of_no_row_is_a_dash(single, recwarn):
    """One row longer than all that was picked may come first in the random order: then there is nothing to compare with."""
    audit = pq.read_table(single / "selection/audit.parquet")
    none = pa.array([False] * ROWS)
    audit = audit.set_column(audit.column_names.index("random"), "random", none)
    pq.write_table(audit, single / "selection/audit.parquet")
    write_selection_report(single)
    page = (single / "selection/report.html").read_text()
    assert "of a random choice –" in page
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
