"""A short campaign of accidents, and what it must be able to see; the whole one is `python scripts/torture.py`."""

from __future__ import annotations

import json
import sys

import pytest

from ftrun import registry

sys.path.insert(0, str(registry.PACKAGE.parent / "scripts"))
import soak
import torture


@pytest.mark.slow
def test_a_short_campaign_loses_nothing(tmp_path):
    """Every kind once where there is time, but for those of two processes: `test_loop` and `test_launch` hurt them."""
    alone = [fault for fault in torture.plan(seed=1, short=len(torture.KINDS)) if "x2" not in fault.subject]
    found = torture.campaign(tmp_path, 1, alone, seconds=75)  # what a slow machine does not reach is left out
    assert len(found) > 5 and not [outcome for outcome in found if outcome.outcome == "lost"]
    assert sum(outcome.outcome == "survived" for outcome in found) > len(found) / 2


def test_a_campaign_has_every_kind_and_repeats():
    """A fault draws the same again from seed and number alone; the full campaign has at least 300."""
    whole = torture.plan(seed=0)
    assert len(whole) >= 300 and {fault.kind for fault in whole} == set(torture.KINDS)
    again = next(fault for fault in torture.plan(seed=0, short=30) if fault.number == 41)
    assert again.draw.random() == whole[40].draw.random()


def test_what_is_no_clear_refusal():
    assert torture.Ended(2, "notes\nftrun: x is damaged\n  /file").refusal == "ftrun: x is damaged\n  /file"
    for code, said in [
        (1, "ftrun: x"),
        (2, "no word of ours"),
        (2, "Traceback (most recent call last)\nftrun: x"),
        (5, "ftrun: a component failed: KeyError: 'x'"),
        (None, "ftrun: x"),
        (-9, ""),
    ]:
        assert torture.Ended(code, said).refusal is None, said


def test_a_silent_difference_is_lost(monkeypatch, tmp_path):
    judge = object.__new__(torture.Judge)
    judge.out, judge.whole = tmp_path, {"bits": {"weights": "1", "metrics.jsonl": [1.0]}}
    monkeypatch.setattr(torture, "bits", lambda out: {"weights": "1", "metrics.jsonl": [1.0000001]})
    with pytest.raises(torture.Lost, match=r"silently in metrics\.jsonl"):
        judge.is_the_same()


def test_a_curve_that_grows_is_seen():
    flat = [1.0] * 100
    assert soak.growth(flat) == 0
    assert soak.growth([1.0 + 0.01 * i for i in range(100)]) > max(soak.GROWTH.values())
    values = {"step": [float(i) for i in range(1, 101)], **dict.fromkeys(soak.GROWTH, flat)}
    assert soak.picture(json.loads(json.dumps(values))).count("polyline") == 3
