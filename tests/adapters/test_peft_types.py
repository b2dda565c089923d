"""Types of peft read from its source: names, types and defaults, one of a release to come, and nothing imported."""

from __future__ import annotations

import dataclasses
import enum
import subprocess
import sys
import textwrap

import pytest

from ftrun import registry
from ftrun.adapters import peft_limits as limits
from ftrun.adapters import peft_types

TYPES = list(peft_types.specs())


@pytest.mark.parametrize("name", TYPES)
def test_knobs_are_the_fields_of_peft_with_its_defaults(name):
    fields = {field.name: field for field in dataclasses.fields(peft_types.config_class(name))}
    changed = limits.KNOBS.get(name, {}).keys() | {"target_modules"}
    for knob in peft_types.specs()[name].knobs.values():
        field = fields[knob.name]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        default = default.value if isinstance(default, enum.Enum) else default
        assert knob.name in changed or knob.default == default, knob.name


@pytest.mark.parametrize("name", TYPES)
def test_what_is_no_knob_is_so_on_purpose(name):
    """Every field of peft is a knob, or stands in the table, or is its base class's."""
    from peft.config import PeftConfig

    fields = {field.name for field in dataclasses.fields(peft_types.config_class(name)) if field.init}
    ours = {field.name for field in dataclasses.fields(PeftConfig)}
    left_out = fields - ours - set(peft_types.specs()[name].knobs)
    assert left_out <= limits.NO_KNOBS["*"].keys() | limits.NO_KNOBS.get(name, {}).keys()


@pytest.fixture
def tomorrow(tmp_path, monkeypatch):
    """A peft that brings one new type, and a class whose fields cannot all be read."""
    folder = tmp_path / "peft" / "tuners" / "nova"
    folder.mkdir(parents=True)
    (tmp_path / "peft" / "__init__.py").touch()
    (folder / "config.py").write_text(
        textwrap.dedent('''
        import enum
        from dataclasses import dataclass, field
        from typing import Literal, Optional, Union

        from peft.config import PeftConfig

        Way = Literal["up", "down"]


        class Kind(str, enum.Enum):
            ONE = "one"
            TWO = "two"


        @dataclass
        class NovaConfig(PeftConfig):
            """See https://huggingface.co/papers/2612.00001."""

            r: int = field(default=8, metadata={"help": "The rank. Choose it well."})
            target_modules: Optional[Union[list[str], str]] = field(default=None)
            way: Union[str, Way] = "up"
            kind: Union[Kind, str] = field(default=Kind.TWO, metadata={"help": "Which"})
            sizes: Optional[dict[str, int]] = field(default_factory=dict)
            length: int = None
            fan_in_fan_out: bool = False
            strange: "Something" = field(default_factory=make_it)

            def __post_init__(self):
                self.peft_type = PeftType.NOVA
        ''')
    )
    monkeypatch.setattr(peft_types, "folder", lambda: tmp_path / "peft")
    caches = (peft_types.specs, peft_types._sources, peft_types._parsed)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_new_type_is_there_without_a_line_of_ours(tomorrow):
    spec = peft_types.specs()["nova"]
    assert "2612.00001" in spec.doc
    told = {knob.name: (registry.type_name(knob.type), knob.default) for knob in spec.knobs.values()}
    assert told == {
        "r": ("int", 8),
        "target_modules": ("list of text | text | null", "all-linear"),
        "way": ("up | down", "up"),
        "kind": ("one | two", "two"),
        "sizes": ("dict of text to int | null", {}),
        "length": ("int | null", None),
    }
    assert spec.knobs["r"].help == "The rank"
    for setting in limits.WAYS_OUT:  # nothing is promised of it
        assert limits.cannot("nova", setting)


def test_types_are_listed_without_torch_or_peft():
    """A fresh interpreter: this one has imported both."""
    code = (
        "import sys; from ftrun import registry; specs = registry.specs('adapter');"
        "assert len(specs['vera'].knobs) > 5; assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", sorted(limits.LEFT_OUT))
def test_a_type_that_is_left_out_says_why(name):
    from ftrun.config.words import wrong_choice

    assert limits.LEFT_OUT[name] in str(wrong_choice("adapter", name))
