"""A knob that nothing reads is a lie to the user."""

from __future__ import annotations

import re

import pytest

from ftrun import registry
from ftrun.adapters import peft_types
from ftrun.config.cluster import cluster_knobs
from ftrun.config.settings import SECTIONS, SETTINGS_FILE

SOURCES = {path: path.read_text() for path in registry.PACKAGE.rglob("*.py")}


def readers(key: str, outside: tuple[str, ...]) -> list[str]:
    pattern = re.compile(rf"\.{key}\b(?!\s*=[^=])")
    return [str(path) for path, text in SOURCES.items() if pattern.search(text) and not str(path).endswith(outside)]


def section_keys():
    for section, cls in SECTIONS.items():
        for key in registry.read_dataclass(SETTINGS_FILE, cls.__name__):
            yield section, key
    for key in registry.read_dataclass(SETTINGS_FILE, "RootConfig"):
        yield "", key


@pytest.mark.parametrize("section,key", list(section_keys()))
def test_section_key_is_read(section, key):
    """Somewhere outside the schema and its bounds checks, code reads the attribute."""
    assert readers(key, ("config/settings.py", "config/compose.py", "config/values.py")) or key in (
        "paper",
        "fidelity",
        "differences",
    ), f"{section}.{key}"


@pytest.mark.parametrize("key", cluster_knobs())
def test_cluster_key_is_read(key):
    # processes and gpus_per_node are read together, by processes_of
    assert readers(key, ("config/cluster.py",)) or key == "processes"


@pytest.mark.parametrize("slot,name", [(slot, name) for slot in registry.SLOTS for name in registry.specs(slot)])
def test_component_knob_is_read(slot, name):
    """Every knob of a component is read as an attribute in its own file or in a base class of it."""
    spec = registry.find(slot, name)
    if spec.library:
        pattern, texts = r"[\"'.]{}\b", texts_of_library(spec)
    else:
        assert spec.source
        pattern = r"\b(self|config|knobs)\.{}\b"
        texts = [path.read_text() for path in {owner for owner, _ in registry._lineage(spec.source, spec.cls)}]
    for knob in spec.knobs:
        assert any(re.search(pattern.format(knob), text) for text in texts), f"{slot}={name}: {knob}"


def texts_of_library(spec):
    """Where a type of peft reads its knobs: outside the class that declares them, or in our class of it."""
    home = peft_types.folder()
    folders = {file.parent for file, _ in peft_types._sources()[spec.name].lineage if file.name == "config.py"}
    files = [file for folder in folders for file in folder.rglob("*.py") if file.name != "config.py"]
    files += [
        home / name for name in ("peft_model.py", "tuners/tuners_utils.py", "tuners/lycoris_utils.py", "utils/other.py")
    ]
    return [file.read_text() for file in [*files, *([spec.source] if spec.source else [])]]
