"""What becomes of the rows that a policy edits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

import ftrun
from ftrun.data.pool import load_pool
from ftrun.data.records import Message, Record
from ftrun.errors import DataError
from ftrun.tokens.base import TokenPolicy, edited_row
from ftrun.tokens.run import edit_rows

SHOWN = "The answer begins with:"


@dataclass
class Twice(TokenPolicy):
    """Every other row two times, in capitals."""

    edits: ClassVar[bool] = True
    calls: ClassVar[list[bool]] = []
    none: bool = False

    def edit(self, records, ctx) -> Iterator[dict[str, Any]]:
        self.calls.append(records is ctx.heldout)
        for record in records:
            if record.id % 2 == 0 and not self.none:
                loud = [replace(message, content=message.content.upper()) for message in record.messages]
                yield edited_row(record, loud)
                yield edited_row(record, loud) | {"copy": 1}


@pytest.fixture
def policy() -> Twice:
    Twice.calls.clear()
    return Twice()


ROWS = [
    {"system": "be short", "instruction": f"ask {i}", "output": f"say {i}", "gold": i, "verifier": "none", "topic": "é"}
    for i in range(6)
]


@pytest.fixture
def prepared(tmp_path, context):
    """A context whose data are these rows, and their pool."""

    def make(rows: list[dict], **data: Any):
        file = tmp_path / "pool.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ctx = context()
        ctx.settings.data = replace(ctx.settings.data, path=str(file), **data)
        return ctx, load_pool(ctx.settings.data, tmp_path / "work", 0)

    return make


def written(folder, name: str = "edited") -> list[dict]:
    return [json.loads(line) for line in (folder / "selection" / f"{name}.jsonl").read_text().splitlines()]


def test_rows_are_written_and_read_back_under_new_ids(policy, prepared):
    ctx, pool = prepared(ROWS, columns={"answer": "gold"})
    edited = edit_rows(policy, pool, ctx)
    lines = written(ctx.out)
    assert [line["row"] for line in lines] == [0, 0, 2, 2, 4, 4]
    assert [record.id for record in edited] == [0, 1, 2, 3, 4, 5]
    assert [record.fields for record in edited] == lines
    assert [message["content"] for message in lines[2]["messages"]] == ["BE SHORT", "ASK 2", "SAY 2"]
    assert sorted(path.name for path in (ctx.out / "selection").iterdir()) == ["edited.jsonl"]


def test_columns_survive_under_the_names_that_every_reader_knows(policy, prepared):
    ctx, pool = prepared(ROWS, columns={"answer": "gold"})
    record = edit_rows(policy, pool, ctx)[2]
    assert (record.kind, record.answer, record.verifier) == ("sft", 2, "none")
    assert [(m.role, m.content) for m in record.messages] == [
        ("system", "BE SHORT"),
        ("user", "ASK 2"),
        ("assistant", "SAY 2"),
    ]
    assert record.fields["topic"] == "é" and record.fields["gold"] == 2


def test_a_system_prompt_of_the_settings_stands_once(policy, prepared):
    rows = [{key: value for key, value in row.items() if key != "system"} for row in ROWS]
    ctx, pool = prepared(rows, system="be kind")
    for record in edit_rows(policy, pool, ctx):
        assert [m.role for m in record.messages] == ["system", "user", "assistant"]


def test_conversations_of_several_turns(policy, prepared):
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    ctx, pool = prepared([{"messages": turns, "chosen": "a", "rejected": "b"}], format="messages")
    record = edit_rows(policy, pool, ctx)[0]
    assert record.messages == tuple(Message(t["role"], t["content"].upper()) for t in turns)  # type: ignore[arg-type]


def test_all_that_a_turn_says_survives(policy, prepared):
    """Weights, of the row too, thoughts, calls and tools; a label beside them does not make feedback of the edited rows."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "weight": 0, "reasoning_content": "hm"},
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "b", "tool_calls": [call]},
    ]
    row = {"messages": turns, "label": "joy", "weight": 0.5, "offers": [{"name": "f"}], "mine": 1}
    ctx, pool = prepared([row], columns={"tools": "offers"}, format="messages", ignore=["mine"])
    before, after = pool[0], edit_rows(policy, pool, ctx)[0]
    assert after.messages == tuple(replace(m, content=m.content.upper()) for m in before.messages)
    assert [m.weight for m in after.messages] == [None, 0, None, 0.5] and after.messages[1].thought == "hm"
    assert (after.kind, after.tools) == ("sft", before.tools) and after.tools and after.messages[3].calls == (call,)


def test_what_is_there_is_read_and_not_made_again(policy, prepared):
    ctx, pool = prepared(ROWS)
    first = edit_rows(policy, pool, ctx)
    again = edit_rows(policy, pool, ctx)
    assert policy.calls == [False] and again.fingerprint == first.fingerprint


def test_a_kill_on_the_way_leaves_no_half_file(policy, prepared, monkeypatch):
    ctx, pool = prepared(ROWS)

    def torn(self, records, ctx) -> Iterator[dict[str, Any]]:
        yield from ({"messages": [], "row": 0},)
        raise KeyboardInterrupt

    monkeypatch.setattr(Twice, "edit", torn)
    with pytest.raises(KeyboardInterrupt):
        edit_rows(policy, pool, ctx)
    assert not list((ctx.out / "selection").iterdir())


def test_nothing_left_is_refused(prepared):
    ctx, pool = prepared(ROWS)
    with pytest.raises(DataError, match="leaves none of 6 rows") as error:
        edit_rows(Twice(none=True), pool, ctx)
    assert "log" in error.value.todo
    ctx.heldout = pool
    with pytest.raises(DataError, match="leaves none of 6 held-out rows"):
        edit_rows(Twice(none=True), pool, ctx, "edited_heldout")


def test_a_policy_can_tell_the_held_out_rows(policy, prepared):
    ctx, pool = prepared(ROWS)
    ctx.heldout = pool.subset([0, 2])
    edit_rows(policy, ctx.heldout, ctx, "edited_heldout")
    edit_rows(policy, pool, ctx)
    assert policy.calls == [True, False]


def test_a_folder_named_like_a_pattern(policy, prepared, tmp_path):
    ctx, pool = prepared(ROWS)
    ctx.out = tmp_path / "run[1]*"
    assert len(edit_rows(policy, pool, ctx)) == 6


def test_an_unedited_record_comes_back_as_it_was():
    messages = (Message("user", "a"), Message("assistant", "b"))
    record = Record(7, "sft", messages=messages, fields={"prompt": "a", "completion": "b", "answer": "old"})
    assert edited_row(record, record.messages) == {
        "prompt": "a",
        "completion": "b",
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "row": 7,
    }


def words(tiny_dir, file, out, *more: str) -> list[str]:
    plain = ["train.batch_size=4", "train.max_steps=4", "train.save_steps=2", "data.heldout=0.2", "data.max_length=256"]
    policy = [] if any(word.startswith("tokens=") for word in more) else ["tokens=lookahead_tuning"]
    return [f"model.path={tiny_dir}", f"data.path={file}", f"out={out}", "recipe=sft", *policy, *plain, *more]


def losses(out) -> list[float]:
    lines = map(json.loads, (out / "train/metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_trains_the_edited_rows_and_leaves_the_held_out_ones(tiny_dir, rows, rows_file, tmp_path):
    done = ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "run", "eval=[generation]"))
    assert done["status"] == "done"
    lines = written(tmp_path / "run")
    assert 0 < len(lines) < len(rows)
    assert all(SHOWN in line["messages"][0]["content"] for line in lines)
    assert all(line["messages"][0]["content"].startswith(rows[line["row"]]["instruction"]) for line in lines)
    assert not (tmp_path / "run/selection/edited_heldout.jsonl").exists()
    answered = (tmp_path / "run/eval/predictions/generation.jsonl").read_text()
    assert answered and SHOWN not in answered


def test_an_edited_prompt_is_an_edited_prompt_everywhere(tiny_dir, rows_file, tmp_path, capfd):
    """Where the model needs the edit: held-out rows, `ftrun eval` and `ftrun generate` have it too."""
    file = tmp_path / "marked.jsonl"
    file.write_text(rows_file.read_text().replace("what is", "what [1] is"))
    out = tmp_path / "run"
    ftrun.run("train", overrides=words(tiny_dir, file, out, "tokens=pause_tuning", "eval=[generation]"))
    held = written(out, "edited_heldout")
    assert held and all("what [1] <PAUSE>  is" in line["messages"][0]["content"] for line in [*held, *written(out)])
    assert (out / "eval/predictions/generation.jsonl").read_text().count("[1] <PAUSE> ") == len(held)
    other = tmp_path / "other.jsonl"
    other.write_text(file.read_text().replace("[1]", "[2]"))
    for path, mark in ((file, "[1]"), (other, "[2]")):
        found = ftrun.run("eval", overrides=[f"run={out}", f"data.path={path}", "eval=[generation]"])
        file = Path(found["out"], "predictions/generation.jsonl")
        asked = [json.loads(line) for line in file.read_text().splitlines()]
        assert asked and all(f"what {mark} <PAUSE>  is" in row["prompt"] for row in asked)


def test_generate_asks_as_training_did(tiny_dir, rows_file, tmp_path, monkeypatch):
    from ftrun.verbs import generate as verb

    out = tmp_path / "run"
    ftrun.run("train", overrides=words(tiny_dir, rows_file, out, "tokens=pause_tuning", "eval=[]"))
    asked = []
    plain = verb.prompt_ids
    monkeypatch.setattr(verb, "prompt_ids", lambda record, tokenizer: asked.append(record) or plain(record, tokenizer))
    ftrun.run("generate", overrides=[f"run={out}", "prompt='a [1] b'"])
    assert asked[0].messages[-1].content == "a [1] <PAUSE>  b"


def test_a_resumed_run_reads_the_rows_that_it_was_started_with(tiny_dir, rows_file, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out in (whole, cut):
        ftrun.run("train", overrides=words(tiny_dir, rows_file, out, "eval=[]"))
    edited = cut / "selection" / "edited.jsonl"
    made = edited.stat().st_mtime_ns
    assert edited.read_text() == (whole / "selection" / "edited.jsonl").read_text()
    for path in sorted((cut / "train/checkpoints").glob("step-000004/*")):
        path.unlink()
    resumed = [w for w in words(tiny_dir, rows_file, cut, "eval=[]") if not w.startswith("out=")]
    ftrun.run("train", overrides=[*resumed, f"resume={cut}"])
    assert edited.stat().st_mtime_ns == made
    assert losses(cut) == losses(whole)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny_dir, rows_file, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        more = ("launch.threads=1", f"launch.processes={processes}", "eval=[]")
        overrides = words(tiny_dir, rows_file, tmp_path / out, *more)
        ftrun.run("train", overrides=overrides)
    assert written(tmp_path / "one") == written(tmp_path / "two")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)


def test_preview_looks_at_edited_rows(tiny_dir, rows_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = [f"model.path={tiny_dir}", f"data.path={rows_file}", "data.max_length=256", "recipe=sft"]
    counts = [ftrun.run("preview", overrides=[*data, *more])["tokens"] for more in ([], ["tokens=lookahead_tuning"])]
    assert counts[0] < counts[1] and "answer" in capsys.readouterr().out
    assert not (tmp_path / "selection").exists()
