"""Every schedule is a pure function with the same few properties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import optimization

from ftrun import registry
from ftrun.errors import ConfigError

NAMES = sorted(registry.specs("schedule"))
DECAYING = ["cosine", "linear", "wsd"]
WARMING = [*DECAYING, "constant_with_warmup"]

warmups = st.one_of(st.floats(0, 0.99), st.integers(0, 50).map(float))
totals = st.integers(1, 300)


def test_all_are_found():
    assert NAMES == ["constant", "constant_with_warmup", "cosine", "linear", "wsd"]


@pytest.mark.parametrize("name", WARMING)
@settings(max_examples=50, deadline=None)
@given(warmup=warmups, total=totals)
def test_within_bounds_and_warm_up_rises(name, warmup, total):
    schedule = registry.build("schedule", name, {"warmup": warmup})
    factors = [schedule.factor(step, total) for step in range(total + 1)]
    assert all(0 <= factor <= 1 for factor in factors)
    steps = schedule.warmup_steps(total)
    rising = factors[: min(steps, total) + 1]
    assert all(later > earlier for earlier, later in itertools.pairwise(rising))
    if 0 < steps < total:
        assert factors[0] == 0 and factors[steps] == 1
    if steps == 0:
        assert factors[0] == 1


@pytest.mark.parametrize("name", DECAYING)
@settings(max_examples=50, deadline=None)
@given(minimum=st.floats(0, 1), total=st.integers(10, 300), warmup=st.floats(0, 0.5))
def test_falls_to_the_minimum_and_stays(name, minimum, total, warmup):
    schedule = registry.build("schedule", name, {"warmup": warmup, "minimum": minimum})
    after = [schedule.factor(step, total) for step in range(schedule.warmup_steps(total), total + 1)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    assert after[-1] == pytest.approx(minimum, abs=1e-12)
    assert schedule.factor(total + 5, total) == pytest.approx(minimum, abs=1e-12)


def by_transformers(make, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(
    ("warmup", "total"),
    [(0, 1), (1, 1), (0.1, 1), (0, 23), (7, 23), (0.1, 23), (0, 100), (1, 100), (7, 100), (0.1, 100)],
)
def test_equal_transformers(warmup, total):
    steps = min(math.ceil(warmup * total), total - 1) if warmup < 1 else warmup
    decay = min(math.ceil(0.2 * total), total - steps)
    o = optimization
    cases = {
        ("constant_with_warmup", ()): lambda x: o.get_constant_schedule_with_warmup(x, steps),
        ("linear", ()): lambda x: o.get_linear_schedule_with_warmup(x, steps, total),
        ("cosine", ()): lambda x: o.get_cosine_schedule_with_warmup(x, steps, total),
        ("cosine", (("minimum", 0.1),)): lambda x: o.get_cosine_with_min_lr_schedule_with_warmup(
            x, steps, total, min_lr_rate=0.1
        ),
    }
    for shape, theirs in (("linear", "linear"), ("cosine", "cosine"), ("sqrt", "1-sqrt")):
        cases["wsd", (("decay", 0.2), ("shape", shape))] = lambda x, theirs=theirs: o.get_wsd_schedule(
            x, steps, decay, total, decay_type=theirs
        )
    for (name, knobs), make in cases.items():
        schedule = registry.build("schedule", name, {"warmup": float(warmup), **dict(knobs)})
        ours = [schedule.factor(step, total) for step in range(total)]
        assert ours == pytest.approx(by_transformers(make, total), abs=1e-12), (name, knobs)


def test_constant_is_one():
    assert {registry.build("schedule", "constant").factor(step, 9) for step in range(9)} == {1.0}


def test_wsd_is_stable_between_warm_up_and_decay():
    schedule = registry.build("schedule", "wsd", {"warmup": 10.0, "decay": 0.25})
    assert {schedule.factor(step, 100) for step in range(10, 76)} == {1.0}
    assert schedule.factor(76, 100) < 1


@pytest.mark.parametrize(
    ("name", "knobs"), [("cosine", {"minimum": 1.5}), ("linear", {"warmup": -1.0}), ("wsd", {"decay": -0.1})]
)
def test_impossible_knobs_are_refused(name, knobs):
    with pytest.raises(ConfigError, match=next(iter(knobs)).replace("warmup", "warm-up")):
        registry.build("schedule", name, knobs)


@pytest.mark.parametrize("name", WARMING)
@given(warmup=st.floats(0, 0.99), total=st.integers(1, 60))
def test_a_share_of_the_steps_never_takes_them_all(name, warmup, total):
    """The warm-up of a run of one step would be the whole run, at a rate of 0."""
    schedule = registry.build("schedule", name, {"warmup": warmup})
    assert any(schedule.factor(step, total) > 0 for step in range(total))
