"""Edits as targets, and the evaluator that applies them."""

from __future__ import annotations

import json

import pytest

import ftrun
from ftrun.data.edits import apply, read
from ftrun.data.pool import load_pool
from ftrun.errors import ConfigError
from ftrun.evaluation.evaluators.edit_span import EditSpans
from ftrun.tokens.policies.edit_span import EditSpan
from ftrun.tokens.run import edit_rows

PAIRS = [("the quick fox", "the quick brown fox"), ("a dog", "a dog"), ("yes no yes", "yes yes"), ("fox", "over 1 2")]


@pytest.fixture
def pairs_rows(tmp_path):
    rows = [{"instruction": "what is better", "input": a, "output": b} for a, b in PAIRS * 4]
    rows = [row | {"instruction": f"what is better {n}"} for n, row in enumerate(rows)]
    file = tmp_path / "pairs_to_edit.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def edited(pairs_rows, context, tmp_path):
    ctx = context("edit_span")
    ctx.settings.data.path = str(pairs_rows)
    pool = load_pool(ctx.settings.data, tmp_path / "work", 0)
    return ctx, edit_rows(EditSpan(), pool, ctx)


def test_the_response_becomes_edits_of_the_source(edited):
    _, pool = edited
    assert [record.response for record in pool][:4] == ["2 2 brown", "None", "1 2 None", "0 1 over 1 2"]
    for record, (source, target) in zip(pool, PAIRS * 4, strict=True):
        assert apply(read(record.response)[0], source) == (target, 0)
        assert source in record.messages[0].content
        assert (record.fields["edit_source"], record.fields["edit_target"]) == (source, target)


def test_rows_without_a_source_are_left_out_and_counted(context, tmp_path):
    file = tmp_path / "few.jsonl"
    rows = [{"instruction": "a b", "input": text, "output": "b"} for text in ("", "a")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ctx = context()
    ctx.settings.data.path = str(file)
    pool = load_pool(ctx.settings.data, tmp_path / "work", 0)
    assert [row["row"] for row in EditSpan().edit(pool, ctx)] == [1]
    assert '1 rows are left out: no text to edit in their column "input"' in ctx.report.warnings[0]
    whole = EditSpan(source=None).edit(pool, ctx)
    assert [row["messages"][-1]["content"] for row in whole] == ["0 1 None", "0 1 None\n2 3 None"]


@pytest.mark.parametrize(
    ("answer", "text", "refused"),
    [
        ("2 2 brown", "the quick brown fox", 0),
        ("2 2 brown\n9 9 x\nnonsense", "the quick brown fox", 2),
        ("I think the text is fine!", "the quick fox", 1),
        ("", "the quick fox", 0),
    ],
)
def test_answers_are_applied_and_never_fail(answer, text, refused, edited, bundle, monkeypatch):
    from ftrun.data.render import Renderer
    from ftrun.models.generation import Writer, stop_ids

    ctx, pool = edited
    ctx.heldout = pool.subset([0])
    evaluator = EditSpans(rows=1)
    stops = stop_ids(bundle, Renderer(bundle.tokenizer))
    ids = [*bundle.tokenizer(answer, add_special_tokens=False)["input_ids"], stops[-1]]
    monkeypatch.setattr(Writer, "generate", lambda *_: [ids])
    found = evaluator.evaluate(bundle, ctx)
    [row] = found.predictions
    assert (row["output"], row["refused"]) == (text, refused)
    assert row["gold"] == "the quick brown fox" and row["score"] == float(text == row["gold"])
    assert found.metrics["accuracy"].value == row["score"]
    assert found.metrics["refused"].value == float(refused > 0)
    assert found.metrics["source_word_f1"].value == pytest.approx(6 / 7)
    gold = bundle.tokenizer("the quick brown fox", add_special_tokens=False)["input_ids"]
    assert found.metrics["length"].value == pytest.approx(len(ids) / len(gold))


def test_rows_without_edits_are_refused(rows_file, bundle, context, tmp_path):
    ctx = context()
    ctx.settings.data.path = str(rows_file)
    ctx.heldout = load_pool(ctx.settings.data, tmp_path / "work", 0)
    with pytest.raises(ConfigError, match="hold none"):
        EditSpans(rows=1, max_new_tokens=2).evaluate(bundle, ctx)


def test_a_run_ends_with_applied_edits(tiny_dir, pairs_rows, tmp_path):
    overrides = [f"model.path={tiny_dir}", f"data.path={pairs_rows}", f"out={tmp_path / 'run'}", "recipe=edit_span"]
    more = ["train.max_steps=2", "train.batch_size=4", "data.heldout=0.4", "eval.edit_span.max_new_tokens=6"]
    summary = ftrun.run("train", overrides=[*overrides, *more, "data.max_length=128"])
    assert {"accuracy", "word_f1", "refused", "length"} <= summary["metrics"]["edit_span"].keys()
    lines = (tmp_path / "run/eval/predictions/edit_span.jsonl").read_text().splitlines()
    assert all(json.loads(line)["gold"] in [target for _, target in PAIRS] for line in lines)
