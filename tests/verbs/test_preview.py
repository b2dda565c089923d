"""What preview shows of token methods: weights made before training, and those of the first step."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from ftrun.config.compose import load
from ftrun.verbs.preview import preview


def words(tiny_dir, rows_file, *more: str) -> list[str]:
    return ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", "data.max_length=256", *more]


def page(capsys, overrides: list[str]) -> str:
    found = preview(load(overrides), html=True)
    capsys.readouterr()
    return open(found["page"]).read()


def shown_weights(html: str) -> list[float]:
    return [float(weight) for weight in re.findall(r'title="weight ([\d.e-]+)', html)]


def test_dynamic_weights_are_those_of_the_first_step(tiny_dir, rows_file, tmp_path, capsys):
    """talr with a given temperature: every shown weight is p ** (1 / tau) of a trained token, or 0."""
    shown = shown_weights(
        page(capsys, words(tiny_dir, rows_file, "tokens=talr", "tokens.tau=10", f"out={tmp_path / 'a'}"))
    )
    weights = np.array(shown)
    inside = weights[weights > 0]
    assert len(inside) > 20 and ((inside > 0.4) & (inside < 0.8)).all()  # about (1 / 384) ** 0.1 at random weights
    assert len(np.unique(inside)) > 5


def test_static_weights_are_made_first(tiny_dir, reference_dir, rows_file, tmp_path, capsys):
    plain = words(tiny_dir, rows_file, f"out={tmp_path / 'b'}")
    all_trained = preview(load(plain), html=True)["trained_tokens"]
    some = preview(
        load([*plain, "tokens=token_cleaning", f"tokens.reference={reference_dir}", "tokens.k=0.5"]), html=True
    )
    capsys.readouterr()
    assert some["trained_tokens"] == int(all_trained * 0.5)


@pytest.mark.parametrize("tokens", ["none", "neftune"])
def test_no_model_is_loaded_for_plain_weights(tokens, tiny_dir, rows_file, monkeypatch, capsys):
    from ftrun.stages.chain import Chain

    monkeypatch.setattr(Chain, "load_model", lambda self: pytest.fail("a model was loaded"))
    counts = preview(load(words(tiny_dir, rows_file, f"tokens={tokens}")), html=False)
    assert counts["trained_tokens"] and "⟦" in capsys.readouterr().out


def test_inputs_that_the_step_changes_are_said(tiny_dir, rows_file, capsys):
    """Registers have weights, but no token of the data stands for them."""
    counts = preview(load(words(tiny_dir, rows_file, "tokens=mutor")), html=False)
    assert "changes the inputs" in counts["note"] and "changes the inputs" in capsys.readouterr().out
    assert "changes the inputs" not in preview(load(words(tiny_dir, rows_file, "tokens=talr")), html=False)["note"]


def test_nothing_is_left_behind(tiny_dir, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    preview(load(words(tiny_dir, rows_file, "tokens=talr")), html=False)
    assert sorted(tmp_path.iterdir()) == before
    json.dumps(capsys.readouterr().out)
