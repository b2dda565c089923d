"""Components as their source describes them are the components that run."""

from __future__ import annotations

import dataclasses
import importlib
import typing

import pytest

from ftrun import registry
from ftrun.config import settings
from ftrun.config.store import CHOSEN, RECIPE_FILE
from ftrun.errors import ConfigError
from ftrun.registry import Knob, read_dataclass, type_name

COMPONENTS = [(slot, name) for slot in registry.SLOTS for name in registry.specs(slot)]


def real_fields(cls: type) -> dict[str, tuple[object, object]]:
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        if dataclasses.is_dataclass(default):  # a section inside the section
            found |= {f"{field.name}.{name}": real for name, real in real_fields(type(default)).items()}
        else:
            found[field.name] = (hints[field.name], default)
    return found


@pytest.mark.parametrize(("slot", "name"), COMPONENTS, ids=lambda value: value)
def test_source_and_class_agree(slot: str, name: str) -> None:
    """Names, order, types and defaults of the knobs, and the capabilities."""
    spec = registry.find(slot, name)
    built = registry.build(slot, name)
    cls = type(built) if spec.library else getattr(importlib.import_module(spec.module), spec.cls)
    assert {knob.name: (knob.type, knob.default) for knob in spec.knobs.values()} == real_fields(cls)
    assert list(spec.knobs) == [field.name for field in dataclasses.fields(cls)]
    assert (spec.needs, spec.lacks) == (cls.needs, cls.lacks)
    assert type(built) is cls and (built.slot, built.name) == (slot, name)


@pytest.mark.parametrize(("slot", "name"), COMPONENTS, ids=lambda value: value)
def test_every_component_and_knob_is_explained(slot: str, name: str) -> None:
    spec = registry.find(slot, name)
    assert spec.doc, f"{slot}={name} has no docstring"
    assert not [knob.name for knob in spec.knobs.values() if not knob.help]


@pytest.mark.parametrize(
    "cls", [settings.RootConfig, settings.SelectConfig, *settings.SECTIONS.values()], ids=lambda cls: cls.__name__
)
def test_sections_are_read_alike(cls: type) -> None:
    knobs = read_dataclass(settings.SETTINGS_FILE, cls.__name__)
    assert {knob.name: (knob.type, knob.default) for knob in knobs.values()} == real_fields(cls)
    assert all(knob.help for knob in knobs.values())


def test_no_scorer_takes_a_name_of_the_select_section() -> None:
    taken = {"model", "picker", "name", RECIPE_FILE, CHOSEN, *settings.shared_select_knobs()}
    for slot, name in COMPONENTS:
        own = set(registry.find(slot, name).knobs)
        assert not own & (taken if slot == "select" else {"name", RECIPE_FILE, CHOSEN}), f"{slot}={name}"


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(ConfigError) as error:
        registry.find("adapter", "loar")
    assert error.value.todo == 'Did you mean "lora"?'
    with pytest.raises(ConfigError, match='no slot "adaptor"'):
        registry.register("adaptor", "mine")


SOURCE = """
from dataclasses import dataclass, field
from typing import ClassVar, Literal

@dataclass
class Base:
    limits: ClassVar[int] = 3
    first: int = 1  # of the base

@dataclass
class Mine(Base):
    first: int = 2  # changed
    mode: Literal["a", "b"] = "a"  # a # is fine
    wrapped: str = (
        "# not this"  # but this
    )
    names: list[str] = field(default_factory=lambda: ["x"])  # names
    table: dict[str, float] = field(default_factory=dict)  # numbers by name
    bare: float | None = -1.5
"""


def test_a_dataclass_is_read_from_its_source(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    knobs = read_dataclass(file, "Mine")
    assert {name: (knob.default, knob.help) for name, knob in knobs.items()} == {
        "first": (2, "changed"),
        "mode": ("a", "a # is fine"),
        "wrapped": ("# not this", "but this"),
        "names": (["x"], "names"),
        "table": ({}, "numbers by name"),
        "bare": (-1.5, ""),
    }
    assert [type_name(knob.type) for knob in knobs.values()] == [
        "int",
        "a | b",
        "text",
        "list of text",
        "dict of text to float",
        "float | null",
    ]


def test_a_knob_without_a_default_is_refused(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class Mine:\n    r: int\n")
    with pytest.raises(ConfigError, match=r"r in .* has no default"):
        read_dataclass(file, "Mine")


def test_knobs_compare_by_value() -> None:
    assert Knob("r", int, 8) == Knob("r", int, 8)
