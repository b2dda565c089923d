"""`make demo` asks for something that exists, and the lock is one that pip can install."""

from __future__ import annotations

import re
import shlex
import tomllib

from ftrun import registry
from ftrun.config.compose import load

CHECKOUT = registry.PACKAGE.parent


def test_the_demo_command_composes() -> None:
    makefile = (CHECKOUT / "Makefile").read_text().replace("\\\n", " ")
    command = re.search(r"^DEMO := (.*)$", makefile, re.MULTILINE)
    assert command is not None
    program, verb, *overrides = shlex.split(command[1])
    assert program.endswith("/ftrun") and verb == "train"
    settings = load(overrides).settings
    assert settings.choice("quant") == "nf4" and settings.choice("select") == "superfiltering"


def test_the_lock_pins_every_dependency_exactly() -> None:
    lines = [line for line in (CHECKOUT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines)
    locked = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert lines[0].startswith("torch==") and len(locked) == len(lines)
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = [line for group in project["optional-dependencies"].values() for line in group]
    names = {re.split(r"[<>=\[ ]", line)[0].lower() for line in [*project["dependencies"], *extras]}
    assert names - {"ftrun"} <= locked
