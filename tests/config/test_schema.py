"""Values against types."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrun.config.schema import check_section, coerce
from ftrun.config.values import parse_budget
from ftrun.errors import ConfigError
from ftrun.registry import Knob


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, float, 3.0),
        (3.0, int, 3),
        (5, float | int, 5),
        (5, int | float | str | None, 5),
        (None, int | None, None),
        ("x", str | list[str], "x"),
        (["x"], str | list[str], ["x"]),
        (12345, str, "12345"),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        (["select"], list[Literal["select", "train"]], ["select"]),
        (True, bool | str, True),
        ({"any": [1]}, Any, {"any": [1]}),
    ],
)
def test_values_that_fit(value: Any, kind: Any, expected: Any) -> None:
    result = coerce(value, kind, "key")
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "todo"),
    [
        (3.5, int, ""),
        (True, int, ""),
        (1, bool, ""),
        ("8", int, ""),
        (None, int, ""),
        (float("inf"), int, ""),
        (float("nan"), float, ""),
        (1200000.0, str, "Quote it to make it text: 'key=\"1200000.0\"'."),  # the commit 12e5
        ("train", list[str], "Write a list: 'key=[train]'."),
        ("sdap", Literal["sdpa", "eager"], 'Did you mean "sdpa"?'),
        (1, Literal[True], ""),
        ([1], dict[str, int], ""),
        ({"a": "b"}, dict[str, int], ""),
    ],
)
def test_values_that_do_not_fit(value: Any, kind: Any, todo: str) -> None:
    with pytest.raises(ConfigError, match=r"^key takes ") as error:
        coerce(value, kind, "key")
    assert error.value.todo == (todo or "See `ftrun show` for the key's meaning and default.")
    assert error.value.where == f"key={value}"


@settings(derandomize=True)
@given(value=st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()))
def test_a_value_is_kept_or_refused_never_changed(value: Any) -> None:
    for kind in (int, float, str, bool, list[int], int | None, Literal["a", 1]):
        try:
            result = coerce(value, kind, "key")
        except ConfigError:
            continue
        assert result in (value, str(value)) or result == float(value)  # a float holds integers up to 2 ** 53


def test_defaults_are_not_shared_between_configs() -> None:
    knobs = {"names": Knob("names", list[str], [])}
    check_section({}, knobs, "section")["names"].append("x")
    assert check_section({}, knobs, "section") == {"names": []}


def test_a_section_given_as_a_value() -> None:
    with pytest.raises(ConfigError, match="train is a section") as error:
        check_section(5, {"epochs": Knob("epochs", float, 1.0)}, "train")
    assert error.value.todo == "Set its keys, as in train.epochs=..."


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, None),
        (0.05, ("share", 0.05)),
        (1.0, ("share", 1.0)),
        (1, ("rows", 1.0)),
        (500, ("rows", 500.0)),
        ("1M_tokens", ("tokens", 1e6)),
        ("2.5k_tokens", ("tokens", 2500.0)),
        ("300tokens", ("tokens", 300.0)),
    ],
)
def test_budgets(budget: Any, expected: Any) -> None:
    assert parse_budget(budget) == expected


@pytest.mark.parametrize("budget", [0, -1, 1.5, 0.0, "5%", "tokens", "0tokens", float("inf"), float("nan")])
def test_what_is_no_budget(budget: Any) -> None:
    with pytest.raises(ConfigError, match="is not a budget"):
        parse_budget(budget)
