"""Every recipe through the real command line for a few steps."""

from __future__ import annotations

import json
import math

import pytest

from ftrun import cli
from ftrun.config import compose, recipes

ARGUMENTS = {
    "tokens=token_cleaning": ["tokens.reference={tiny}"],
    "select=text_quality": ["select.minimum_lines=1"],
    "select=long_output_min": ['select.patterns=["what is ([0-9]+)"]'],
    "select=trim": ["select.queries=[{queries}]", "select.layers=2"],
    "select=icon": ["select.queries=[{queries}]", "select.assessment=3", "select.classifier_batch_size=4"],
    "picker=add_one_in": [
        "select.picker.answer=letter",
        "select.picker.shown=2",
        "select.picker.options=2",
        "select.picker.row_length=20",
    ],
    "picker=cluster_share": ["select.picker.clusters=2"],  # four tenths of a cluster of two rows are none
    "picker=dac_iter": ["select.picker.max_new_tokens=8"],
    "select=embedding_similarity": ["select.queries=[{queries}]"],
    "select=got_d": ["select.queries=[{queries}]"],
    "select=less": ["select.queries=[{queries}]"],
    "select=rds_plus": ["select.queries=[{queries}]"],
}


@pytest.fixture
def rows_for(rows_file, pairs_file, text_file, labels_file):
    return {"sft": rows_file, "pairs": pairs_file, "text": text_file, "labels": labels_file}


def overrides_for(name, rows_for, tiny_dir, tiny_encoder_dir, out) -> list[str]:
    from ftrun import registry

    settings = compose.load([f"recipe={name}", *extra(name, tiny_dir)]).settings
    registry.build("objective", settings.choice("objective"))
    kind = settings.component("objective").kind
    words = [
        f"recipe={name}",
        f"model.path={tiny_encoder_dir if settings.task == 'classify' else tiny_dir}",
        f"data.path={rows_for[kind]}",
        "data.heldout=0.2",
        "data.max_length=128",
        "train.max_steps=3",
        "train.batch_size=4",
        f"out={out}",
        *extra(name, tiny_dir),
    ]
    if (settings.choice("select"), settings.choice("picker")) != ("none", "own"):
        words.append("budget=0.5")
    for evaluator, _knobs in settings.eval:
        if evaluator == "generation":
            words += ["eval.generation.rows=2", "eval.generation.max_new_tokens=4"]
    return words


def extra(name, tiny_dir) -> list[str]:
    recipe = recipes.find(name)
    return [
        word.format(tiny=tiny_dir, queries=queries_file(tiny_dir))
        for choice, words in ARGUMENTS.items()
        if choice in [f"{slot}={recipe.choice(slot)}" for slot in ("tokens", "select", "picker")]
        for word in words
    ]


def queries_file(tiny_dir):
    """Three rows that targeted methods look for."""
    file = tiny_dir.with_name("queries.jsonl")
    rows = [{"instruction": f"what is {i} plus 2", "input": "", "output": f"answers: {i + 2}"} for i in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", sorted(recipes.catalogue()))
def test_recipe_trains(name, rows_for, tiny_dir, tiny_encoder_dir, tmp_path, capsys):
    """Three steps end with a finite loss, something saved, and the files of the contract."""
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
    for name in ("config.yaml", "lock.json", "report.html", "ftrun.log", "train/metrics.jsonl", "eval/results.json"):
        assert (out / name).is_file(), name
    lines = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "memory_bytes"} <= steps[0].keys()


def selecting() -> list[str]:
    found = map(recipes.find, recipes.catalogue())
    return [recipe.name for recipe in found if (recipe.choice("select"), recipe.choice("picker")) != ("none", "own")]


@pytest.mark.parametrize("name", selecting())
def test_recipe_selects(name, rows_for, tiny_dir, tmp_path, capsys):
    """`ftrun select` writes scores and chosen rows with the contract's columns, and the same choice twice."""
    import pyarrow.parquet as pq

    kind = compose.load([f"recipe={name}", *extra(name, tiny_dir)]).settings.component("objective").kind
    total = len(rows_for[kind].read_text().splitlines())
    picked = []
    for attempt in ("one", "two"):
        out = tmp_path / attempt
        words = [
            f"recipe={name}",
            f"model.path={tiny_dir}",
            f"data.path={rows_for[kind]}",
            "budget=5",
            f"out={out}",
            *extra(name, tiny_dir),
        ]
        assert cli.entry(["select", *words]) == 0, capsys.readouterr().err
        table = pq.read_table(out / "selection/scores.parquet").to_pydict()
        assert table["id"] == list(range(total))
        rows = [json.loads(line) for line in (out / "selection/selected.jsonl").read_text().splitlines()]
        assert sum(table["selected"]) == len(rows)
        assert 0 < len(rows) <= 5
        assert {row["id"] for row in rows} == {
            i for i, chosen in zip(table["id"], table["selected"], strict=True) if chosen
        }
        assert sorted(rank for rank in table["rank"] if rank is not None) == list(range(1, len(rows) + 1))
        picked.append([row["id"] for row in rows])
    assert picked[0] == picked[1]
