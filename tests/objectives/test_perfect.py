"""Masks in the right places, the hinge by hand, and prototypes that need no label embeddings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ftrun
from ftrun.config.compose import load
from ftrun.config.settings import ModelConfig
from ftrun.data.batches import collate, micro_batches
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.models.bundle import Bundle
from ftrun.models.load import load_bundle
from ftrun.objectives.perfect import Perfect, with_masks
from ftrun.training.view import StepView

SEPARATOR, CLASS, WORD = 3, 2, 20


@pytest.fixture
def bundle(tiny_encoder_dir: Path) -> Bundle:
    return load_bundle(ModelConfig(path=str(tiny_encoder_dir)), task="classify", labels=3)


@pytest.fixture
def table() -> TokenTable:
    """Nine texts of three classes, as an encoder's tokenizer would write them; the last is a pair."""
    random = np.random.default_rng(1)
    made = []
    for number in range(9):
        ids = [CLASS, *random.integers(6, 30, random.integers(2, 12)), SEPARATOR]
        ids += [9, 8, SEPARATOR] if number == 8 else []
        made.append(Sequence(np.array(ids, np.int32), np.zeros(len(ids), np.float32), number, number % 3))
    return TokenTable.from_sequences(made)


def attached(bundle: Bundle, **knobs: Any) -> Perfect:
    objective = Perfect(mask_token="lazy", **knobs)
    ctx: Any = SimpleNamespace(seed=0)
    objective.attach(bundle, ctx)
    with torch.no_grad():
        objective.embeddings.weight.copy_(torch.randn(objective.embeddings.weight.shape))
    return objective


@pytest.mark.parametrize("separator", [SEPARATOR, None])
def test_masks_stand_before_the_first_separator_or_at_the_end(separator, table):
    batch = collate(table, [[row] for row in range(9)], pad_id=0)
    masked, places = with_masks(batch, WORD, 3, separator)
    for row in range(9):
        ids = table.sequence(row).input_ids.tolist()
        at = ids.index(SEPARATOR) if separator is not None else len(ids)
        expected = [*ids[:at], WORD, WORD, WORD, *ids[at:]]
        assert masked.input_ids[row, : len(expected)].tolist() == expected
        assert (masked.sequence[row] >= 0).tolist() == [i < len(expected) for i in range(masked.input_ids.shape[1])]
        assert places[row].tolist() == [at, at + 1, at + 2]
        assert (masked.input_ids[row, len(expected) :] == 0).all()


def test_loss_follows_the_formula(bundle, table):
    objective = attached(bundle, masks=2, margin=0.7)
    e = (objective.label_rate * objective.embeddings.weight).detach().double().numpy()
    total = []
    for row in range(len(table)):
        ids = table.sequence(row).input_ids.tolist()
        at, word = ids.index(SEPARATOR), objective.mask_id(bundle)
        with torch.no_grad():
            states = bundle.model.bert(torch.tensor([[*ids[:at], word, word, *ids[at:]]])).last_hidden_state[0]
        for i in range(2):
            s = e[i] @ states[at + i].double().numpy()
            gold = int(table.label[row])
            total.append(sum(max(0.0, 0.7 - s[gold] + s[c]) for c in range(3) if c != gold) / 3)
    for batch_tokens in (10_000, 1):
        batches = list(micro_batches(table, np.arange(9), batch_tokens, False, bundle.pad_id))
        views = [StepView(bundle.model, bundle.architecture, batch) for batch in batches]
        value = sum(float(objective.loss(view).value.detach()) for view in views)
        assert value / sum(objective.count(batch) for batch in batches) == pytest.approx(np.mean(total), rel=1e-4)


def test_logits_have_a_place_for_every_mask_and_label(bundle, table):
    objective = attached(bundle, masks=4)
    batch = collate(table, [[0], [1]], pad_id=0)
    states = objective.states(bundle, batch)
    assert states.shape == (2, 4, 32) and objective.embeddings(states).shape == (2, 4, 3)


def test_labels_start_small_and_learn_at_their_own_rate(bundle):
    objective = Perfect(mask_token="lazy", label_rate=5.0)
    ctx: Any = SimpleNamespace(seed=0)
    objective.attach(bundle, ctx)
    embeddings = objective.embeddings
    effective = lambda: (embeddings.rate * embeddings.weight).detach().clone()  # noqa: E731
    start = effective()
    assert 0.5e-4 < float(start.std()) < 2e-4
    optimizer = torch.optim.Adam(embeddings.parameters(), lr=1e-2)
    embeddings(torch.ones(1, 2, 32)).sum().backward()
    optimizer.step()
    torch.testing.assert_close((effective() - start).abs(), torch.full_like(start, 5e-2), rtol=1e-3, atol=1e-6)


def test_a_row_without_room_is_refused(bundle, table):
    with pytest.raises(DataError, match="no room for 2 masks"):
        attached(bundle).states(replace(bundle, context_length=10), collate(table, [[8], [3], [7]], pad_id=0))


def test_masks_are_what_the_tokenizer_has(bundle, tiny_dir):
    with pytest.raises(ConfigError, match="neither a mask token"):
        Perfect().mask_id(bundle)
    with pytest.raises(ConfigError, match="is 2 tokens"):
        Perfect(mask_token="lazy dog").mask_id(bundle)
    decoder = load_bundle(ModelConfig(path=str(tiny_dir)), task="classify", labels=2)
    assert Perfect().mask_id(decoder) == decoder.tokenizer.eos_token_id


@pytest.mark.parametrize("knobs", [{"masks": 0}, {"margin": 0.0}, {"label_rate": 0.0}])
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        Perfect(**knobs)


@pytest.mark.parametrize("word", ["tokens=neftune", "task=causal"])
def test_clashes_are_refused(word):
    with pytest.raises(ConfigError):
        Perfect().check(load(["recipe=perfect_fewshot", word]).settings)


def words(model: Path, labels_file: Path, out: Path, *more: str) -> list[str]:
    quick = ["data.heldout=0.3", "train.max_steps=4", "train.batch_size=8"]
    return ["recipe=perfect_fewshot", f"model.path={model}", f"data.path={labels_file}", f"out={out}", *quick, *more]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_run_learns_and_predicts_without_label_embeddings(kind, tiny_encoder_dir, tiny_dir, labels_file, tmp_path):
    model = tiny_encoder_dir if kind == "encoder" else tiny_dir
    more = ["objective.mask_token=lazy"] if kind == "encoder" else []  # the decoder reads ends of text
    summary = ftrun.run("train", overrides=words(model, labels_file, tmp_path / "run", *more))
    trained = load_file(tmp_path / "run/train/checkpoints/step-000004/trainable.safetensors")
    assert trained["objective.weight"].shape == (2, 2, 32)
    assert all("norm" in n.lower() or ".up." in n or ".down." in n or n == "objective.weight" for n in trained)
    saved = load_file(tmp_path / "run/adapter/bottleneck.safetensors")
    assert saved.keys() == trained.keys() - {"objective.weight"}
    again = ftrun.run("eval", overrides=[f"run={tmp_path / 'run'}"])  # no label embeddings there
    assert again["metrics"]["prototypes"]["accuracy"] == summary["metrics"]["prototypes"]["accuracy"]
    lines = [json.loads(line) for line in (tmp_path / "run/eval/predictions/prototypes.jsonl").read_text().splitlines()]
    assert {line["gold"] for line in lines} <= {"good", "bad", "LABEL_0", "LABEL_1", 0, 1} and lines[0][
        "similarity"
    ] > 0
