"""Which tokens a method keeps, as the report counts them."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from ftrun.data.token_classes import CLASSES, token_class
from ftrun.reporting.run import Run
from ftrun.reporting.tokenchoice import choice_tables, group_table, moved_section, turns_and_places


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "word"), ("don't", "word"), (" über", "word"), ("词", "word"),
        ("12", "number"), (" 3.5", "number"), ("$18", "number"), ("50%", "number"),
        (".", "punctuation"), (" (", "punctuation"), ("?\n", "punctuation"),
        ("):", "punctuation"), ("==", "code"), (" _name", "code"), ("x1", "code"), ("    ", "code"), ("\t", "code"),
        ("\n", "space"), (" ", "space"), ("\n\n", "space"), ("", "space"), ("+", "code"),
    ],
)  # fmt: skip
def test_kinds_of_tokens(text, kind):
    assert token_class(text) == kind


def test_answers_and_places():
    """Row 5 has two answers of 2 and 3 tokens, row 9 one of 4; prompts between them."""
    ids = np.array([5] * 8 + [9] * 5)
    asked = np.array([0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], bool)
    turn, place = turns_and_places(ids, asked)
    assert turn[asked].tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_allclose(place[asked], [0, 1 / 2, 0, 1 / 3, 2 / 3, 0, 1 / 4, 2 / 4, 3 / 4])


def test_answers_of_neighbouring_rows_are_apart():
    turn, place = turns_and_places(np.array([1, 1, 2, 2]), np.ones(4, bool))
    assert turn.tolist() == [0, 0, 0, 0] and place.tolist() == [0, 0.5, 0, 0.5]


def test_shares_of_a_group():
    html = group_table("kind", ["a", "b", "c"], np.array([0, 0, 0, 0, 2, 2]), np.array([1, 0, 0, 0, 1, 1.0]))
    assert "25.0%" in html and "100.0%" in html and "<td>b</td>" not in html and "mean weight" not in html


@pytest.fixture
def folder(tmp_path, tiny_dir):
    """A run that kept numbers only."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids, positions, tokens, scores, weights = [], [], [], [], []
    for row, text in enumerate(["the dog 1 2", "a fox 3 4", "yes no 5"]):
        numbers = tokenizer(text).input_ids
        for position, number in enumerate(numbers):
            keep = token_class(tokenizer.decode([number])) == "number"
            ids.append(row), positions.append(position), tokens.append(number)
            scores.append(float(keep) + 0.01 * position), weights.append(float(keep))
    (tmp_path / "selection").mkdir()
    columns = {"id": ids, "position": positions, "token": tokens, "score": scores, "weight": weights}
    parquet.write_table(pa.table(columns), tmp_path / "selection/tokens.parquet")
    return tmp_path


def test_a_method_that_keeps_numbers(folder):
    page = "".join(choice_tables(Run(folder)))
    row = page[page.index("<td>number</td>") :]
    assert "100.0%" in row[: row.index("</tr>")]
    row = page[page.index("<td>word</td>") :]
    assert "0.0%" in row[: row.index("</tr>")]
    assert "Heaviest tokens" in page and "<mark>" in page


def test_shares_of_the_roles(folder):
    file = folder / "selection/tokens.parquet"
    roles = {"prompt": {"tokens": 40, "kept": 0, "weight": 0}, "answer": {"tokens": 8, "kept": 6, "weight": 6}}
    parquet.write_table(parquet.read_table(file).replace_schema_metadata({"roles": json.dumps(roles)}), file)
    page = "".join(choice_tables(Run(folder)))
    for role, share in (("prompt", "0.0%"), ("answer", "75.0%")):
        row = page[page.index(f"<td>{role}</td>") :]
        assert share in row[: row.index("</tr>")]


def test_the_heaviest_tokens_are_those_of_the_highest_weight(folder):
    """Whatever their scores are: thresholds of a row of its own may drop a token that outscores kept ones."""
    table = parquet.read_table(folder / "selection/tokens.parquet").to_pydict()
    table["score"] = [-score for score in table["score"]]
    parquet.write_table(pa.table(table), folder / "selection/tokens.parquet")
    page = "".join(choice_tables(Run(folder)))
    heaviest, lightest = page[page.index("Heaviest tokens") :].split("Lightest tokens")
    shown = [
        [weight == "1" for weight in re.findall(r"weight ([\d.]+) · score", part)] for part in (heaviest, lightest)
    ]
    kept = sum(map(bool, table["weight"]))
    assert shown[0] == [True] * kept + [False] * (len(shown[0]) - kept)
    assert not any(shown[1][: len(shown[1]) - kept])


def test_no_choice_no_table(folder):
    table = parquet.read_table(folder / "selection/tokens.parquet").to_pydict()
    table["weight"] = [1.0] * len(table["weight"])
    parquet.write_table(pa.table(table), folder / "selection/tokens.parquet")
    assert choice_tables(Run(folder)) == [] and moved_section(Run(folder)) is None


def test_weights_over_the_steps(tmp_path):
    fact = {"tokens": 10, "kept": 5, "mean": 0.4}
    example = {"factor": 0.9, "row": 7, "before": "the lazy", "token": " dog", "after": "\n"}
    lines = [
        {
            "step": step,
            **fact,
            "classes": dict.fromkeys(CLASSES[:2], fact),
            "parts": [fact] * 9 + [{"tokens": 0, "kept": 0, "mean": None}],
            "heaviest": [example],
            "lightest": [],
        }
        for step in (1, 2, 3)
    ]
    (tmp_path / "train").mkdir()
    (tmp_path / "train/token_weights.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = moved_section(Run(tmp_path))
    assert page and "Heaviest tokens of step 3" in page and "<mark> dog</mark>↵" in page and "Lightest" not in page
    assert "50.0% of the trained tokens" in page and "weight, word" in page and "weight, code" not in page
