"""What the stage cache gives back, and when it gives nothing."""

from __future__ import annotations

import json
import shutil

import pytest

from ftrun.runs import stagecache
from ftrun.runs.artifacts import MANIFEST
from ftrun.runs.stagecache import KEY, Key

ONE, OTHER = Key("select", {"seed": 0}), Key("select", {"seed": 1})


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "selection"
    source.mkdir()
    files = [source / name for name in ("scores", "chosen")]
    for file in files:
        file.write_text(file.name)
    stagecache.keep(ONE, files)
    return ONE.folder


def test_what_was_kept_comes_back_without_manifest_and_key(kept, tmp_path):
    assert stagecache.fetch(ONE, tmp_path / "run" / "selection")
    found = {file.name: file.read_text() for file in (tmp_path / "run" / "selection").iterdir()}
    assert found == {"scores": "scores", "chosen": "chosen"} and (kept / MANIFEST).exists()
    assert json.loads((kept / KEY).read_text()) == {"seed": 0}  # what it was kept under can be read there


def test_damage_counts_as_absent(kept, tmp_path):
    (kept / "chosen").write_text("chosem")
    assert not stagecache.fetch(ONE, tmp_path / "run")
    assert not stagecache.fetch(OTHER, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_copy_that_fails_leaves_nothing(kept, tmp_path, monkeypatch):
    def fails(source, target, **_):
        shutil.copy(source / "scores", target / "scores")
        raise OSError("gone")

    monkeypatch.setattr(shutil, "copytree", fails)
    with pytest.raises(OSError, match="gone"):
        stagecache.fetch(ONE, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
