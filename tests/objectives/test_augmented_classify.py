"""mixup and the contrastive term against plain numpy, on heads of every kind."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ftrun.config.settings import ModelConfig
from ftrun.data.batches import collate
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError
from ftrun.models.load import load_bundle
from ftrun.objectives.augmented_classify import AugmentedClassify, contrastive_sum, mixed_loss, sentence_vectors
from ftrun.objectives.classify import Classify
from ftrun.training.view import StepView

LABELS = [0, 1, 2, 0, 1, 1]


def make_view(folder, **known) -> StepView:
    bundle = load_bundle(ModelConfig(path=str(folder)), task="classify", labels=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in bundle.model.get_submodule(bundle.architecture.head_name or "").parameters():
            parameter.normal_()
    random = np.random.default_rng(0)
    sequences = [
        Sequence(random.integers(5, 30, 4 + 3 * row).astype(np.int32), np.zeros(4 + 3 * row, np.float32), row, label)
        for row, label in enumerate(LABELS)
    ]
    batch = collate(TokenTable.from_sequences(sequences), [[row] for row in range(6)], bundle.pad_id)
    return StepView(bundle.model, bundle.architecture, batch, **known)


@pytest.fixture(params=["decoder", "encoder"])
def view(request, tiny_dir, tiny_encoder_dir) -> StepView:
    counts = {"loss": 6.0, "anchors": 5.0}
    return make_view(tiny_dir if request.param == "decoder" else tiny_encoder_dir, counts=counts)


def seeded(**knobs) -> AugmentedClassify:
    objective = AugmentedClassify(**knobs)
    objective.seed = 0
    return objective


def again(view: StepView) -> StepView:
    """The same rows, to be run once more."""
    return StepView(view.model, view.architecture, view.batch, counts=view.counts)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_the_head_reads_the_vectors_that_it_was_given(view):
    vectors, logits, head = sentence_vectors(view)
    assert vectors.shape == (6, 32)
    torch.testing.assert_close(head(vectors), logits, rtol=1e-5, atol=1e-6)


def test_a_head_that_takes_the_first_token_itself(view, monkeypatch):
    """RoBERTa's head gets all states and takes the first."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(32, 3)

        def forward(self, states):
            return self.out(states[:, 0])

    states, head = torch.randn(6, 9, 32), First()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = head

        def forward(self, **_):
            return SimpleNamespace(logits=self.classifier(states))

    architecture = SimpleNamespace(head_name="classifier")
    vectors, logits, found = sentence_vectors(StepView(Model(), architecture, view.batch))  # type: ignore[arg-type]
    assert vectors.shape == (6, 1, 32)
    torch.testing.assert_close(found(vectors), logits)


def test_without_mixing_it_is_plain_classification(view):
    ours, plain = seeded(mixup=0.0).loss(view), Classify().loss(again(view))
    torch.testing.assert_close(ours.value, plain.value)
    assert ours.parts["accuracy"] == plain.parts["accuracy"]


def test_a_share_of_one_is_plain_cross_entropy(view):
    vectors, _, head = sentence_vectors(view)
    labels = view.batch.label
    value = mixed_loss(vectors, labels, torch.ones(6), torch.tensor([5, 4, 3, 2, 1, 0]), head)
    torch.testing.assert_close(value, Classify().loss(view).value)


def test_mixing_follows_the_formula(view):
    objective = seeded(mixup=0.4)
    shares, partners = objective.mix(view)
    vectors, _, head = sentence_vectors(view)
    v, (weight, bias) = vectors.detach().double().numpy(), (head.weight, head.bias)
    mixed = shares.numpy()[:, None] * v + (1 - shares.numpy()[:, None]) * v[partners.numpy()]
    logits = mixed @ weight.detach().double().numpy().T + (0 if bias is None else bias.detach().double().numpy())
    logs, labels, places = log_softmax(logits), np.array(LABELS), np.arange(6)
    expected = -(shares.numpy() * logs[places, labels] + (1 - shares.numpy()) * logs[places, labels[partners]]).sum()
    assert objective.loss(again(view)).value.item() == pytest.approx(expected, rel=1e-4)


def test_mixes_are_drawn_for_the_step_and_its_rows(view):
    objective = seeded(mixup=0.2)
    (shares, partners), (later, _) = objective.mix(view), objective.mix(replace(view, step=1))
    assert torch.equal(objective.mix(view)[0], shares) and torch.equal(objective.mix(view)[1], partners)
    assert not torch.equal(shares, later)
    assert sorted(partners.tolist()) == list(range(6)) and ((shares >= 0) & (shares <= 1)).all()


def contrastive_in_numpy(v: np.ndarray, labels: list[int], t: float) -> float:
    z = v / np.linalg.norm(v, axis=1, keepdims=True)
    total = 0.0
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        below = sum(np.exp(z[i] @ z[a] / t) for a in range(len(z)) if a != i)
        if positives:
            total -= np.mean([np.log(np.exp(z[i] @ z[p] / t) / below) for p in positives])
    return total


def test_the_contrastive_term_follows_the_formula(view):
    vectors = sentence_vectors(view)[0].detach()
    expected = contrastive_in_numpy(vectors.double().numpy(), LABELS, 0.3)
    assert contrastive_sum(vectors, view.batch.label, 0.3).item() == pytest.approx(expected, rel=1e-4)
    objective = seeded(mixup=0.0, contrastive=0.5, temperature=0.3)
    assert objective.counts(view.batch) == {"anchors": 5.0}, "the row of label 2 is alone"
    added = objective.loss(again(view)).value - Classify().loss(view).value
    assert added.item() == pytest.approx(0.5 * expected * 6 / 5, rel=1e-3)


def test_rows_of_one_label_each_give_no_contrast_and_no_nan():
    vectors = torch.randn(3, 4, requires_grad=True)
    value = contrastive_sum(vectors, torch.tensor([0, 1, 2]), 0.1)
    value.backward()
    assert value == 0 and vectors.grad is not None and not vectors.grad.isnan().any()
    lonely = contrastive_sum(torch.randn(1, 4), torch.tensor([0]), 0.1)
    assert lonely == 0


def test_gradients_reach_the_model_and_are_finite(view):
    seeded(mixup=0.2, contrastive=0.1).loss(view).value.backward()
    gradients = [p.grad for p in view.model.parameters() if p.grad is not None]
    assert len(gradients) > 4 and all(g.isfinite().all() for g in gradients)


def test_bad_knobs_are_refused():
    for knobs in ({"mixup": -1.0}, {"contrastive": -0.1}, {"temperature": 0.0}):
        with pytest.raises(ConfigError, match="0 or more"):
            AugmentedClassify(**knobs)
