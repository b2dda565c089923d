"""The command line as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import warm_processes

from ftrun import cli
from ftrun.cli import parse
from ftrun.config.grammar import normal_override

LIGHT = [["--help"], ["recipes"], ["show", "recipe=lisa"], ["train", "recipe=lora_sft", "adapter.rr=4"], ["trian"]]


@pytest.mark.slow
def test_light_commands_leave_torch_alone():
    """Help, listings and mistakes must not wait for torch: one fresh interpreter, which has imported nothing before."""
    program = f"""
import sys
from ftrun import cli
for words in {LIGHT!r}:
    cli.entry(words)
    heavy = {{"torch", "transformers", "peft", "datasets"}} & sys.modules.keys()
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_flags_may_stand_anywhere():
    line = parse(["train", "recipe=sft", "-m", "seed=0,1", "--cfg", "job", "--json"])
    assert line.verb == "train" and line.sweep and line.json
    assert line.overrides == ["recipe=sft", "seed=0,1"]
    assert line.hydra_flags == ["-m", "--cfg", "job"]


@pytest.mark.parametrize(
    "word,expected",
    [
        ("select.picker=kmq", "picker=kmq"),
        ("select/picker=kmq", "picker=kmq"),
        ("select.scorer=ifd", "select=ifd"),
        ("prompt=What is 2+2, please?", "prompt='What is 2+2, please?'"),
        ("prompt=it's", "prompt='it\\'s'"),
        ("data.path=a b.jsonl", "data.path='a b.jsonl'"),
        ("data.path=[a.jsonl,b.jsonl]", "data.path=[a.jsonl,b.jsonl]"),
        ("adapter.r=4", "adapter.r=4"),
    ],
)
def test_overrides_are_normalised(word, expected):
    assert normal_override(word) == expected


def test_free_text_survives(tiny_dir):
    from ftrun.config import compose

    for text in ("What is 2+2?", "it's, {so} [odd] = $x ${y}", "a\\b", 'say "hi"', "日本語"):
        assert compose.load([normal_override(f"prompt={text}")]).settings.prompt == text


@pytest.mark.parametrize(
    "words,code,expected",
    [
        (["trian"], 2, 'Did you mean "train"?'),
        (["train"], 2, "which recipe?"),
        (["train", "recipe=qlora"], 2, 'Did you mean "qlora_sft"?'),
        (["train", "recipe=sft", "adapter=lorra"], 2, 'Did you mean "lora"?'),
        (["train", "recipe=lora_sft", "adapter.rr=4"], 2, 'Did you mean "adapter.r"?'),
        (["train", "recipe=lora_sft", "adapter.r=many"], 2, "adapter.r takes int"),
        (["train", "recipe=qlora_sft", "adapter=lisa"], 2, "Use quant=none, or adapter=lora."),
        (["train", "recipe=sft", "+adapter.foo=1"], 2, "foo"),
        (["train", "recipe=sft", "data.path=no_such.jsonl", "out=OUT"], 3, "no_such.jsonl"),
        (["train", "recipe=sft", "model.path=./no_such_folder", "out=OUT"], 2, "no_such_folder"),
        (["merge"], 2, "which run?"),
        (["eval", "run=no/such/run"], 2, "there is no run in no/such/run"),
        (["generate", "model.path=x"], 2, "what shall it answer?"),
        (["train", "recipe=sft", "budget=-1"], 2, "budget"),
        (["train", "recipe=sft", "train.batch_size=0"], 2, "train.batch_size"),
    ],
)
def test_mistakes_get_one_clear_message(words, code, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("OUT", str(tmp_path / "run")) for word in words]
    assert cli.entry(words) == code
    printed = capsys.readouterr()
    assert expected in printed.err and "Traceback" not in printed.err
    message = printed.err[printed.err.index("ftrun: ") :]
    assert len(message.strip().splitlines()) <= 3


QUICK = ["data.heldout=0.2", "data.max_length=128", "train.max_steps=2", "train.batch_size=4"]


@pytest.mark.slow
def test_sweep_runs_every_job(tiny_dir, rows_file, tmp_path, monkeypatch, capsys):
    """-m crosses the values, swaps slots inside the sweep, and every job has a run folder of its own."""
    monkeypatch.chdir(tmp_path)
    words = [
        "train",
        "-m",
        "recipe=lora_sft",
        "adapter=lora,lisa",
        "seed=0,1",
        f"model.path={tiny_dir}",
        f"data.path={rows_file}",
        "eval=[]",
        *QUICK,
    ]
    assert cli.entry(words) == 0, capsys.readouterr().err
    summaries = [json.loads(file.read_text()) for file in (tmp_path / "runs/lora_sft").glob("*/summary.json")]
    assert len(summaries) == 4 and all(summary["status"] == "done" for summary in summaries)
    assert len({summary["trainable_parameters"] for summary in summaries}) == 2


def test_sweep_is_checked_before_it_starts(tiny_dir, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.entry(["train", "-m", "recipe=lora_sft", "adapter=lora,lissa", f"data.path={rows_file}"]) == 2
    assert 'Did you mean "lisa"?' in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_json_is_the_last_line(tiny_dir, rows_file, tmp_path):
    words = ["recipe=lora_sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "ftrun", "train", *words, "eval=[]", "--json", *QUICK]
    done = warm_processes.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1]) == json.loads((tmp_path / "run/summary.json").read_text())


def test_hydra_shows_the_composed_config(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.entry(["train", "recipe=qlora_sft", "adapter.r=3", "--cfg", "job"]) == 0
    printed = capfd.readouterr().out
    assert "r: 3" in printed and "double_quant: true" in printed
