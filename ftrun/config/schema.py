"""Checking values against typed knobs; every refusal names the key and the nearest valid word."""

from __future__ import annotations

import copy
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ftrun.errors import ConfigError, nearest
from ftrun.registry import Knob, type_name

LARGEST = 2**63  # what arrays and generators count with
SENTENCES = ("prompt", "system")  # knobs whose text is never the name of a file


def check_section(values: Any, knobs: Mapping[str, Knob], prefix: str, owner: str = "") -> dict[str, Any]:
    """All knobs of a section with their checked values; a key without a knob is refused.

    ``owner`` names the component that the knobs belong to, as in ``adapter=lora``.
    """
    if not isinstance(values, dict):
        todo = f"Set its keys, as in {_join(prefix, next(iter(knobs)))}=..." if knobs else f"{owner} has no knobs."
        raise ConfigError(f"{prefix} is a section, not a value", f"{prefix}={values}", todo)
    values = _flat(values, knobs, prefix)
    for key in values:
        if key not in knobs:
            what = f'{owner} has no knob "{key}"' if owner else f'there is no key "{_join(prefix, key)}"'
            raise ConfigError(what, f"{_join(prefix, key)}={values[key]}", nearest(str(key), knobs))
    given = {
        name: coerce(values[name] if name in SENTENCES else _at_home(values[name]), knob.type, _join(prefix, name))
        for name, knob in knobs.items()
        if name in values
    }
    return {name: given[name] if name in given else copy.deepcopy(knob.default) for name, knob in knobs.items()}


def _flat(values: dict[str, Any], knobs: Mapping[str, Knob], prefix: str) -> dict[str, Any]:
    """Sections inside a section by their dotted names, as their knobs have them."""
    first = {name.partition(".")[0]: name for name in reversed(list(knobs)) if "." in name}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in first and not isinstance(value, dict):
            what, todo = f"{_join(prefix, key)} is a section, not a value", f"as in {_join(prefix, first[key])}=..."
            raise ConfigError(what, f"{_join(prefix, key)}={value}", f"Set its keys, {todo}")
        flat |= {f"{key}.{name}": item for name, item in value.items()} if key in first else {key: value}
    return flat


def _at_home(value: Any) -> Any:
    """``~/`` as the home folder, which no shell does behind an equals sign."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def coerce(value: Any, kind: Any, key: str) -> Any:
    """``value`` as ``kind``; numbers widen (3 to 3.0), nothing else is guessed.

    Raises ConfigError where the value does not fit.
    """
    try:
        return _coerce(value, kind)
    except (TypeError, ValueError, OverflowError):
        what = f"{key} takes {type_name(kind)}, not {value!r}"
        raise ConfigError(what, f"{key}={value}", _way_out(value, kind, key)) from None


def _way_out(value: Any, kind: Any, key: str) -> str:
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    choices = [
        str(choice) for option in options if typing.get_origin(option) is Literal for choice in typing.get_args(option)
    ]
    if choices and isinstance(value, str):
        return nearest(value, choices)
    if any(typing.get_origin(option) is list or option is list for option in options) and isinstance(
        value, (str, int, float)
    ):
        return f"Write a list: '{key}=[{value}]'."
    if str in options and isinstance(value, (float, bool)):
        return f"Quote it to make it text: '{key}=\"{value}\"'."
    return "See `ftrun show` for the key's meaning and default."


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Union or isinstance(kind, types.UnionType)


def _coerce(value: Any, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise ValueError
    if _is_union(kind):
        return _first_fit(value, arguments)
    if kind is None or kind is type(None):
        if value is None:
            return None
        raise ValueError
    if origin is list or kind is list:
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return [_coerce(item, arguments[0]) if arguments else item for item in value]
    if origin is dict or kind is dict:
        if not isinstance(value, dict):
            raise ValueError
        if not arguments:
            return value
        return {_coerce(name, arguments[0]): _coerce(item, arguments[1]) for name, item in value.items()}
    return _scalar(value, kind)


def _scalar(value: Any, kind: type) -> Any:
    """A number never becomes text by way of float: the commit 12e5 would turn into 1200000.0."""
    if isinstance(value, bool):
        if kind is bool:
            return value
    elif kind is float and isinstance(value, (int, float)) and not math.isnan(value):
        return float(value)
    elif kind is int and isinstance(value, (int, float)) and value == int(value) and abs(value) < LARGEST:
        return int(value)
    elif kind is str and isinstance(value, (str, int)):
        return str(value)
    raise ValueError


def _first_fit(value: Any, options: tuple[Any, ...]) -> Any:
    """An exact type wins over a widened one: 5 stays an int in ``float | int``."""
    for option in options:
        if option is type(value) or (option in (None, type(None)) and value is None):
            return _coerce(value, option)
    for option in options:
        try:
            return _coerce(value, option)
        except (TypeError, ValueError, OverflowError):
            continue
    raise ValueError


def _join(prefix: str, key: Any) -> str:
    return f"{prefix}.{key}" if prefix else str(key)
