"""Tab completion, as the shells ask for it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from ftrun import cli
from ftrun.completion import SCRIPTS, candidates


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("ftrun tr", ["train "]),
        ("ftrun train recipe=qlo", ["recipe=qlora_sft"]),
        ("ftrun train recipe=qlora_sft quant=n", ["quant=nf4", "quant=none"]),
        ("ftrun train model.dt", ["model.dtype="]),
        ("ftrun train model.dtype=b", ["model.dtype=bfloat16"]),
        ("ftrun train eval=[heldout,gen", ["eval=[heldout,generation"]),
        ("ftrun train -m adapter=lora,li", ["adapter=lora,lisa"]),
        ("ftrun train +model.dt", ["+model.dtype="]),
        ("ftrun train adapter=lisa adapter.la", ["adapter.layers="]),
        ("ftrun select select.picker=km", ["select.picker=kmeans_random", "select.picker=kmq"]),
        ("ftrun recipes tsh", ["tshirt"]),
        ("ftrun train --js", ["--json"]),
        ("ftrun train clus", []),
        ("ftrun submit tr", ["train "]),
        ("ftrun submit train clus", ["cluster.", "cluster="]),
        ("ftrun submit train cluster=", ["cluster=slurm"]),
        ("ftrun submit train cluster.no", ["cluster.nodes="]),
        ("ftrun submit train cluster.requeue=", ["cluster.requeue=false", "cluster.requeue=true"]),
        ("ftrun train data.path=", []),  # any file: the shell's own turn
        ("ftrun train recipe=no_such adapter.", []),
    ],
)
def test_what_may_follow(line, found):
    assert candidates(line) == found


def test_knobs_of_the_recipes_adapter():
    assert {"adapter.r=", "adapter.use_dora="} <= set(candidates("ftrun train recipe=qlora_sft adapter."))
    assert candidates("ftrun train adapter.") == []  # no recipe, no adapter


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_script_of_a_shell(shell, capsys, monkeypatch):
    """The script can be read by its shell where there is one, and asks with $FTRUN_LINE."""
    assert cli.entry(["--completion", shell]) == 0
    script = capsys.readouterr().out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
    monkeypatch.setenv("FTRUN_LINE", "ftrun train recipe=qlo")
    assert cli.entry(["--complete"]) == 0
    assert capsys.readouterr().out == "recipe=qlora_sft\n"


def test_an_unknown_shell(capsys):
    assert cli.entry(["--completion", "tcsh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
