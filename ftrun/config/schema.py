"""Checking values against typed knobs; every refusal names the key and the nearest valid word."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal

from ftrun.errors import ConfigError, nearest
from ftrun.registry import Knob, type_name


def check_section(values: dict[str, Any], knobs: dict[str, Knob], prefix: str, owner: str = "") -> dict[str, Any]:
    """All knobs of a section with their checked values; a key without a knob is refused."""
    for key in values:
        if key not in knobs:
            whose = f"{owner} has no knob" if owner else "there is no key"
            raise ConfigError(f'{whose} "{key}"', f"{_join(prefix, key)}={values[key]}", nearest(key, knobs))
    return {
        name: coerce(values[name], knob.type, _join(prefix, name)) if name in values else knob.default
        for name, knob in knobs.items()
    }


def coerce(value: Any, kind: Any, key: str) -> Any:
    """``value`` as ``kind``; numbers widen (3 to 3.0), nothing else is guessed.

    Raises ConfigError where the value does not fit.
    """
    try:
        return _coerce(value, kind)
    except (TypeError, ValueError):
        todo = ""
        if typing.get_origin(kind) is Literal and isinstance(value, str):
            todo = nearest(value, [str(choice) for choice in typing.get_args(kind)])
        raise ConfigError(f"{key} takes {type_name(kind)}, not {value!r}", f"{key}={value}", todo) from None


def _coerce(value: Any, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError
    if origin is typing.Union or isinstance(kind, types.UnionType):
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
        return {key: _coerce(item, arguments[1]) if arguments else item for key, item in value.items()}
    return _scalar(value, kind)


def _scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
        return int(value)
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
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
        except (TypeError, ValueError):
            continue
    raise ValueError


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
