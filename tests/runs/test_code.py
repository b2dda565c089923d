"""Which sources a result hangs on: what it imports in turn, the components it takes, and nothing else."""

from __future__ import annotations

import shutil

import pytest

from ftrun import registry
from ftrun.runs import code, lockfile
from ftrun.runs.stagecache import key_of

CHOSEN = {"select": ["superfiltering"], "picker": ["top_k"], "quant": ["none"], "tokens": []}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the project that may be edited; ``edit`` takes a file below ftrun/."""
    copy = tmp_path / "ftrun"
    shutil.copytree(registry.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(registry, "PACKAGE", copy)

    def edit(name: str, text: str = "\n# another line\n") -> None:
        file = copy / name
        file.write_text(file.read_text() + text)
        code._read.cache_clear()

    yield edit
    code._read.cache_clear()


def key() -> str:
    return key_of("select", {"seed": 0}, modules=["ftrun.stages.select"], chosen=CHOSEN).digest


def test_a_change_in_what_is_imported_in_turn_changes_the_key(package):
    before = key()
    package("models/head.py")
    assert key() != before


def test_what_runs_counts_and_other_methods_do_not():
    """The scorer, its base, what those import, the components beside it."""
    found = set(code.sources(["ftrun.stages.select"], CHOSEN))
    runs = ["models.head", "models.kernels", "select.scoring.difficulty", "select.scorers.superfiltering", "quant.none"]
    assert found >= {f"ftrun.{name}" for name in (*runs, "select.pickers.top_k", "training.scoring", "data.render")}
    others = ["select.scorers.igf", "select.pickers.kmq", "tokens.policies.talr", "adapters.layers.lisa", "optim.lion"]
    assert not found & {f"ftrun.{name}" for name in (*others, "evaluation.run", "reporting.html", "quant.nf4", "cli")}


def test_every_way_to_import_is_followed_but_types(package):
    """Inside a function, relative, of a name, of a module, of a component by name; never under TYPE_CHECKING."""
    lines = """
if TYPE_CHECKING:
    from ftrun.verbs import plan
else:
    import ftrun.verbs.merge

def late():
    from .lion import Lion
    from ftrun.evaluation import likelihood
    return registry.build("schedule", "wsd"), settings.component("picker"), registry.build("quant", chosen_later)
"""
    package("optim/sgd.py", lines)
    found = set(code.sources(["ftrun.optim.sgd"], {"picker": ["kmq"]}))
    assert found >= {"ftrun.optim.lion", "ftrun.verbs.merge", "ftrun.evaluation.likelihood", "ftrun.schedules.wsd"}
    assert found >= {"ftrun.select.pickers.kmq", "ftrun.quant.nf4", "ftrun.quant.int8"}  # or any of a slot
    assert not found & {"ftrun.verbs.plan", "ftrun.select.pickers.top_k", "ftrun.cli"}


def test_the_version_of_a_library_changes_the_key(monkeypatch):
    before = key()
    monkeypatch.setattr(code, "version", lambda name: "9.9" if name == "peft" else lockfile.version(name))
    assert key() != before


def test_a_component_of_another_package_counts_with_what_it_imports(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "method.py").write_text("from elsewhere.formula import value\nfrom ftrun.select.base import Scorer\n")
    (folder / "formula.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = code.sources(["elsewhere.method"])
    assert {"elsewhere.method", "elsewhere.formula", "ftrun.select.base"} <= set(found)
    (folder / "formula.py").write_text("value = 2\n")
    code._read.cache_clear()
    assert code.sources(["elsewhere.method"])["elsewhere.formula"] != found["elsewhere.formula"]
