"""What the stage cache gives back, and when it gives nothing."""

from __future__ import annotations

import shutil

import pytest

from ftrun.runs import stagecache
from ftrun.runs.artifacts import MANIFEST, cache_dir


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "selection"
    source.mkdir()
    files = [source / name for name in ("scores", "chosen")]
    for file in files:
        file.write_text(file.name)
    stagecache.keep("select", "key", files)
    return cache_dir() / "stages" / "select-key"


def test_what_was_kept_comes_back_without_the_manifest(kept, tmp_path):
    assert stagecache.fetch("select", "key", tmp_path / "run" / "selection")
    found = {file.name: file.read_text() for file in (tmp_path / "run" / "selection").iterdir()}
    assert found == {"scores": "scores", "chosen": "chosen"} and (kept / MANIFEST).exists()


def test_damage_counts_as_absent(kept, tmp_path):
    (kept / "chosen").write_text("chosem")
    assert not stagecache.fetch("select", "key", tmp_path / "run")
    assert not stagecache.fetch("select", "other", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_copy_that_fails_leaves_nothing(kept, tmp_path, monkeypatch):
    def fails(source, target, **_):
        shutil.copy(source / "scores", target / "scores")
        raise OSError("gone")

    monkeypatch.setattr(shutil, "copytree", fails)
    with pytest.raises(OSError, match="gone"):
        stagecache.fetch("select", "key", tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
