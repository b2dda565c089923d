"""Prompts, batches and label words of in-context tuning."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import ftrun
from ftrun.data.batches import Plan
from ftrun.data.pool import load_pool
from ftrun.data.records import Record
from ftrun.data.render import Renderer
from ftrun.data.tokens import TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.tokens.policies.in_context_tuning import InContextTuning
from ftrun.tokens.run import edit_rows

LABELS = {"mood": ("good", "bad"), "animal": ("dog", "fox", "cow")}


def rows(counts: dict[str, int]) -> list[dict]:
    return [
        {"text": f"<{task}{i}>", "label": LABELS[task][i % len(LABELS[task])], "task": task}
        for task, count in counts.items()
        for i in range(count)
    ]


def records(counts: dict[str, int]) -> list[Record]:
    made = rows(counts)
    return [Record(at, "labels", text=row["text"], label=row["label"], fields=row) for at, row in enumerate(made)]


@pytest.fixture
def small(context):
    def make(batch_size: int = 4):
        ctx = context("in_context_tuning")
        ctx.settings.train = replace(ctx.settings.train, batch_size=batch_size)
        return ctx

    return make


def asked(line: dict) -> list[str]:
    return line["messages"][0]["content"].split("\n\n")


def number_in(part: str) -> str:
    return part.split("<")[1].split(">")[0]


def test_demonstrations_of_the_task_and_the_query_last(small):
    lines = list(InContextTuning(draws=1).edit(records({"mood": 12, "animal": 12}), small()))
    assert [line["row"] for line in lines] == list(range(24))
    for line in lines:
        parts = asked(line)
        assert len(parts) == 6
        assert number_in(parts[-1]) == number_in(line["text"])
        assert parts[-1].endswith(("Label:", "Output:"))
        for part in parts[:-1]:
            name = number_in(part)
            assert name.startswith(line["task"]) and name != number_in(line["text"])
            labels = LABELS[line["task"]]
            assert part.endswith(" " + labels[int(name.removeprefix(line["task"])) % len(labels)])
        assert len({number_in(part) for part in parts}) == 6
        assert line["messages"][1]["content"] == line["label"]


def test_no_shots_is_instruction_tuning(small):
    lines = list(InContextTuning(shots=0, draws=1, templates=["{text} is {label}"]).edit(records({"mood": 4}), small()))
    assert [line["messages"][0]["content"] for line in lines] == [f"<mood{i}> is" for i in range(4)]


def test_draws_have_other_demonstrations(small):
    lines = list(InContextTuning(draws=3).edit(records({"mood": 12}), small()))
    assert len(lines) == 36
    for row in range(12):
        assert len({line["messages"][0]["content"] for line in lines if line["row"] == row}) == 3


def test_other_labels(small):
    policy = InContextTuning(shots=3, draws=1, other_labels=True)
    for line in policy.edit(records({"animal": 12}), small()):
        assert not any(part.endswith(f" {line['label']}") for part in asked(line))


def test_words_stand_for_labels(small):
    policy = InContextTuning(draws=1, words={"good": "yes", "bad": "no"})
    for line in policy.edit(records({"mood": 8}), small()):
        assert line["messages"][1]["content"] == {"good": "yes", "bad": "no"}[line["label"]]
        assert not any(word in part for part in asked(line) for word in ("good", "bad"))


def test_renaming_labels_renames_words_and_changes_nothing_else(small):
    first = records({"mood": 8})
    other = [replace(r, label={"good": "bad", "bad": "good"}[str(r.label)]) for r in first]
    lines = [
        list(InContextTuning(draws=1, templates=["{text} {label}"]).edit(part, small())) for part in (first, other)
    ]
    assert [len(asked(line)) for line in lines[0]] == [len(asked(line)) for line in lines[1]]


def test_small_tasks_are_said(small):
    ctx = small(2)
    lines = list(InContextTuning(draws=1).edit(records({"mood": 4}), ctx))
    assert all(len(asked(line)) == 4 for line in lines)
    assert "4 prompts have fewer than 5 demonstrations" in ctx.report.warnings[0]


@pytest.fixture
def tokenised(small, bundle, tmp_path):
    """Edited rows and their tokens as a run would make them."""

    def make(counts: dict[str, int], batch_size: int = 4, policy: InContextTuning | None = None):
        policy = policy or InContextTuning(shots=2, draws=2)
        ctx = small(batch_size)
        file = tmp_path / "labelled.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(counts)))
        ctx.settings.data = replace(ctx.settings.data, path=str(file))
        pool = edit_rows(policy, load_pool(ctx.settings.data, tmp_path / "work", 0), ctx)
        renderer = Renderer(bundle.tokenizer)
        return policy, TokenTable.from_sequences([renderer.sequences(record)[0] for record in pool]), ctx, pool

    return make


def test_every_batch_holds_one_task(tokenised):
    policy, table, ctx, pool = tokenised({"mood": 13, "animal": 7})
    table.remembered = policy.remember(table, ctx)
    assert len(table) == 28 + 16  # 26 and 14 filled up to whole batches
    assert not ctx.report.warnings
    plan = Plan.of(len(table), 4, 1.0, None, 0, policy.order(table))
    tasks = [[pool[int(table.record[row])].fields["task"] for row in plan.step(step)] for step in range(plan.steps)]
    assert all(len(set(batch)) == 1 for batch in tasks)
    firsts = [batch[0] for batch in tasks]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)
    assert sorted(row for step in range(plan.steps) for row in plan.step(step)) == list(range(len(table)))


def test_rows_that_fill_no_batch_come_last_and_are_said(tokenised):
    policy, table, ctx, _ = tokenised({"mood": 8, "animal": 8})
    short = table.rows(np.arange(1, len(table)))
    short.remembered = policy.remember(short, ctx)
    assert (policy.order(short) == short.remembered["batch"].max()).sum() == 3
    assert "3 rows fill no batch" in ctx.report.warnings[-1]


def test_words_that_begin_alike_are_refused(tokenised):
    policy = InContextTuning(shots=1, draws=1, words={"good": "yes 1", "bad": "yes 2"})
    _, table, ctx, _ = tokenised({"mood": 8}, policy=policy)
    with pytest.raises(DataError, match='"yes 1" and "yes 2" begin with the same token'):
        policy.remember(table, ctx)


@pytest.mark.parametrize(
    "knobs",
    [
        {"shots": -1},
        {"draws": 0},
        {"templates": []},
        {"templates": ["{text}"]},
        {"templates": ["{label} {text}"]},
    ],
)
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        InContextTuning(**knobs)


def words(tiny_dir, file, out, *more: str) -> list[str]:
    plain = ["train.batch_size=4", "train.max_steps=3", "data.heldout=0.3", "tokens.shots=1", "eval=[]"]
    return ["recipe=in_context_tuning", f"model.path={tiny_dir}", f"data.path={file}", f"out={out}", *plain, *more]


def losses(out) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train/metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def two_tasks(tmp_path):
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows({"mood": 16, "animal": 12})))
    return file


def test_a_run_does_not_depend_on_the_cut(tiny_dir, two_tasks, tmp_path):
    for name, more in (("a", ()), ("b", ("train.batch_tokens=1",)), ("c", ("train.packing=true",))):
        ftrun.run("train", overrides=words(tiny_dir, two_tasks, tmp_path / name, *more))
    np.testing.assert_allclose(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "a"), losses(tmp_path / "c"), rtol=1e-5)
    assert losses(tmp_path / "a")[0] < np.log(3) + 0.3  # two or three words compete, not a vocabulary


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny_dir, two_tasks, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        more = ("launch.threads=1", f"launch.processes={processes}")
        overrides = words(tiny_dir, two_tasks, tmp_path / out, *more)
        ftrun.run("train", overrides=overrides)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5)
