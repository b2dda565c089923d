"""The loss over label words against logits of the whole vocabulary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ftrun.config.settings import ModelConfig, Settings
from ftrun.data.batches import micro_batches
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import DataError
from ftrun.models.head import Head
from ftrun.models.load import load_bundle
from ftrun.objectives.label_words import LabelWords, words_of
from ftrun.runs.progress import Reporter
from ftrun.training.view import StepView

WORDS = {0: [20, 21, 22], 1: [21, 30]}


@pytest.fixture
def bundle(tiny_dir):
    return load_bundle(ModelConfig(path=str(tiny_dir)), task="causal")


@pytest.fixture
def labelled() -> TokenTable:
    """Ten rows of two tasks: a prompt, a label word, and the end of the turn, which is trained too."""
    random = np.random.default_rng(3)
    made, tasks = [], []
    for number in range(10):
        task = number % 2
        prompt = random.integers(40, 300, random.integers(2, 9))
        word = WORDS[task][number // 2 % len(WORDS[task])]
        weight = np.concatenate([np.zeros(len(prompt)), np.ones(2)]).astype(np.float32)
        made.append(Sequence(np.array([*prompt, word, 2], np.int32), weight, number))
        tasks.append(task)
    table = TokenTable.from_sequences(made)
    table.remembered["task"] = np.repeat(tasks, table.lengths).astype(np.float32)
    return table


def objective_for(table: TokenTable, bundle) -> LabelWords:
    ctx: Any = SimpleNamespace(train_tokens=table, settings=Settings(), report=Reporter(live=False))
    objective = LabelWords()
    assert objective.attach(bundle, ctx) is None
    return objective


def total(objective: LabelWords, table: TokenTable, bundle, batch_tokens: int = 10_000, packing: bool = False):
    batches = micro_batches(table, np.arange(len(table)), batch_tokens, packing, bundle.pad_id)
    losses = [(objective.loss(StepView(bundle.model, bundle.architecture, batch)), batch) for batch in batches]
    value = sum(float(loss.value) for loss, _ in losses)
    right = sum(float(loss.parts["accuracy"]) for loss, _ in losses)
    return value, right, sum(objective.count(batch) for _, batch in losses)


def expected(table: TokenTable, bundle, words: dict[int, list[int]]) -> tuple[float, int]:
    value, right = 0.0, 0
    for row in range(len(table)):
        ids = torch.tensor(table.sequence(row).input_ids.tolist())
        with torch.no_grad():
            logits = bundle.model(ids[None]).logits[0, len(ids) - 3].double().numpy()
        own = np.array([logits[word] for word in words[row % 2]])
        gold = words[row % 2].index(int(ids[-2]))
        value += np.log(np.exp(own - own.max()).sum()) + own.max() - own[gold]
        right += int(own.argmax() == gold)
    return value, right


def test_the_loss_is_a_softmax_over_the_words_of_the_task(labelled, bundle):
    objective = objective_for(labelled, bundle)
    assert {task: words.tolist() for task, words in words_of(labelled).items()} == WORDS
    value, right, count = total(objective, labelled, bundle)
    wanted, hits = expected(labelled, bundle, WORDS)
    assert value == pytest.approx(wanted, rel=1e-5) and right == hits and count == 10


@pytest.mark.parametrize(("batch_tokens", "packing"), [(1, False), (20, False), (64, True)])
def test_the_cut_and_packing_do_not_matter(batch_tokens, packing, labelled, bundle):
    objective = objective_for(labelled, bundle)
    whole = total(objective, labelled, bundle)
    assert total(objective, labelled, bundle, batch_tokens, packing) == pytest.approx(whole, rel=1e-5)


def test_without_tasks_all_words_compete(labelled, bundle):
    labelled.remembered.clear()
    words = [20, 21, 22, 30]
    value, _, _ = total(objective_for(labelled, bundle), labelled, bundle)
    assert value == pytest.approx(expected(labelled, bundle, {0: words, 1: words})[0], rel=1e-5)


def test_permuting_the_words_with_their_labels_changes_nothing(labelled, bundle):
    """Neither the order of a task's words counts, nor which label a word stands for."""
    objective = objective_for(labelled, bundle)
    whole = total(objective, labelled, bundle)
    objective._words = {task: words.flip(0) for task, words in objective._words.items()}
    assert total(objective, labelled, bundle) == pytest.approx(whole, rel=1e-6)


def test_other_logits_get_no_gradient(labelled, bundle):
    """Only the label words of the batch's tasks are pushed: no other row of an untied head moves."""
    objective = objective_for(labelled, bundle)
    [batch] = micro_batches(labelled, np.arange(0, 10, 2), 10_000, False, bundle.pad_id)
    head = torch.nn.Linear(32, bundle.architecture.vocabulary, bias=False)
    head.weight.data.copy_(bundle.model.get_output_embeddings().weight.data)
    hidden = StepView(bundle.model, bundle.architecture, batch).hidden.detach()

    view = StepView(bundle.model, bundle.architecture, batch)
    view.__dict__["hidden"] = hidden
    view.architecture = type("Fixed", (), {"head": lambda _, model: Head(head.weight)})()  # type: ignore[assignment]
    objective.loss(view).value.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum(1).nonzero().flatten().tolist() == WORDS[0]


def test_rows_with_one_word_are_refused(labelled, bundle):
    one = TokenTable.from_sequences([labelled.sequence(0), labelled.sequence(0)])
    with pytest.raises(DataError, match="begin with the same token"):
        objective_for(one, bundle)


def test_a_batch_without_targets_has_no_loss(labelled, bundle):
    objective = objective_for(labelled, bundle)
    bare = labelled.with_weights(np.zeros_like(labelled.loss_weight))
    [batch] = micro_batches(bare, np.arange(2), 10_000, False, bundle.pad_id)
    loss = objective.loss(StepView(bundle.model, bundle.architecture, batch))
    assert float(loss.value) == 0 and objective.count(batch) == 0
