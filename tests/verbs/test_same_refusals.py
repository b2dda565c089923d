"""What preview and plan refuse and tell of the rows is what train does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ftrun
from ftrun.config.compose import load
from ftrun.errors import ConfigError, DataError, FtrunError
from ftrun.verbs.plan import plan
from ftrun.verbs.preview import preview

pytestmark = pytest.mark.slow  # whole runs, one after the other

SFT = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(40)]
OTHERS = {
    "pairs": [{"prompt": f"q {n}", "chosen": "good", "rejected": "bad"} for n in range(4)],
    "binary": [{"prompt": f"q {n}", "completion": "good", "label": n % 2 == 0} for n in range(4)],
    "labels": [{"text": f"t {n}", "label": n % 2} for n in range(4)],
    "text": [{"text": f"text {n}"} for n in range(4)],
}


def rows_in(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def refusals(words: list[str], out: Path) -> list[FtrunError]:
    """How preview, plan and train refuse the same words."""
    errors = []
    for act in (
        lambda: preview(load(words), html=False),
        lambda: plan(load(words)),
        lambda: ftrun.run("train", overrides=[*words, f"out={out}"]),
    ):
        with pytest.raises(FtrunError) as caught:
            act()
        errors.append(caught.value)
    return errors


def same(errors: list[FtrunError]) -> FtrunError:
    first = errors[0]
    for error in errors[1:]:
        assert (type(error), error.what, error.where, error.todo) == (type(first), first.what, first.where, first.todo)
    return first


@pytest.mark.parametrize(
    ("rows", "words", "kind", "said"),
    [
        *((rows, [], DataError, f"these are {kind} rows") for kind, rows in OTHERS.items()),
        (SFT[:1], ["data.heldout=0.999999"], FtrunError, "held out"),
        (SFT, ["data.split=test"], DataError, "data.split=test chooses nothing"),
        (SFT, ["data.max_length=4"], DataError, "longer than data.max_length=4"),
        (SFT, ["select=random"], ConfigError, "needs a budget"),
        ([*SFT, {"prompt": "q", "completion": ""}], [], DataError, "has an empty completion"),
    ],
)
def test_refused_alike(rows, words, kind, said, tiny_dir, tmp_path):
    base = ["recipe=lora_sft", f"model.path={tiny_dir}", f"data.path={rows_in(tmp_path, rows)}", "eval=heldout"]
    error = same(refusals([*base, *words], tmp_path / "out"))
    assert isinstance(error, kind) and said in error.what
    if "binary rows" in error.what:
        assert "No objective reads" in error.todo and "recipe=dpo" in error.todo


def test_rows_without_held_out_ones_can_be_looked_at(tiny_dir, tmp_path, capsys):
    """What only evaluation lacks does not hide the rows, and is said."""
    words = ["recipe=lora_sft", f"model.path={tiny_dir}", f"data.path={rows_in(tmp_path, SFT)}", "data.heldout=0"]
    for act in (lambda: preview(load(words), html=False), lambda: plan(load(words))):
        assert act()["rows"] == len(SFT)
        said = " ".join(capsys.readouterr().err.split())
        assert "train would refuse this: eval=heldout has no rows: none were held out." in said


def test_a_split_of_a_folder_and_rows_left_out_are_told_alike(tiny_dir, tmp_path, capsys):
    """The notes of train stand in preview and plan, and they read the rows that train reads."""
    rows_in(tmp_path, [*SFT, {"prompt": "q", "completion": ""}], "rows/train.jsonl")
    rows_in(tmp_path, SFT[:3], "rows/test.jsonl")
    words = ["recipe=lora_sft", f"model.path={tiny_dir}", f"data.path={tmp_path / 'rows'}", "data.unfit=drop"]
    told = []
    for act in (lambda: preview(load(words), html=False), lambda: plan(load(words))):
        counts = act()
        err = capsys.readouterr().err
        told.append((counts["rows"], [line for line in err.splitlines() if "left out" in line or "split" in line]))
    ftrun.run("train", overrides=[*words, "train.max_steps=1", "stages=[train]", f"out={tmp_path / 'out'}"])
    err = " ".join(capsys.readouterr().err.split())
    assert told[0] == told[1] and told[0][0] < 40
    assert "1 row of" in str(told[0][1]) and "the split train is read, of test, train" in " ".join(told[0][1])
    assert "left out (data.unfit=drop)" in err and "the split train is read" in err
