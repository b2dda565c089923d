"""docs/cluster.md quotes files that can be copied, and every command in them is one."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import yaml

from ftrun import cli, registry
from ftrun.config import compose
from ftrun.config.cluster import is_cluster_word, read_cluster

ROOT = registry.PACKAGE.parent
FILES = sorted((ROOT / "scripts" / "cluster").iterdir())
PAGE = ROOT / "docs" / "cluster.md"
SHELL = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "nodes": "2", "gpus": "8", "key": "out"}


def commands(text: str) -> list[str]:
    """The lines `ftrun VERB ...` of a text, continued ones joined, with a word for every variable of the shell."""
    joined = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"ftrun (?:train|submit) [^\"#`\n]*", joined)
    return [re.sub(r"\$(\w+)", lambda name: SHELL.get(name[1], "host"), line) for line in found]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_page_quotes_the_file(file):
    assert f"\n{file.read_text()}```\n" in PAGE.read_text()


@pytest.mark.parametrize("file", [*FILES, PAGE], ids=lambda file: file.name)
def test_every_command_composes(file):
    lines = commands(file.read_text())
    assert lines
    for line in lines:
        words = [word for word in shlex.split(line)[1:] if word not in ("-m", "...", "resume=RUN")]
        parsed = cli.parse(words)
        clusters = [
            word.replace("slurm_site.yaml", str(ROOT / "scripts/cluster/slurm_site.yaml"))
            for word in parsed.overrides
            if is_cluster_word(word)
        ]
        read_cluster(clusters)
        compose.check_all([word for word in parsed.overrides if not is_cluster_word(word)], "train")


def test_scripts_are_shell_and_yaml():
    for file in FILES:
        if file.suffix == ".sh":
            subprocess.run(["bash", "-n", file], check=True)
        else:
            assert all(yaml.safe_load_all(file.read_text()))
    subprocess.run(["bash", "-n", ROOT / "scripts" / "slurm_testbed.sh"], check=True)
