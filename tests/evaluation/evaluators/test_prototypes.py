"""Prototypes and similarities by hand."""

from __future__ import annotations

import numpy as np
import pytest

import ftrun
from ftrun.errors import ConfigError
from ftrun.evaluation.evaluators.prototypes import class_means, similarities


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector**2).sum())


def test_similarity_is_the_largest_over_the_masks():
    random = np.random.default_rng(0)
    states, prototypes = random.normal(size=(5, 3, 4)), random.normal(size=(2, 3, 4))
    found = similarities(states, prototypes)
    for row in range(5):
        for label in range(2):
            each = [np.exp(-np.sum((unit(states[row, i]) - unit(prototypes[label, i])) ** 2)) for i in range(3)]
            assert found[row, label] == pytest.approx(max(each))


def test_means_do_not_depend_on_the_order_and_a_class_may_be_empty():
    random = np.random.default_rng(0)
    states, labels = random.normal(size=(12, 2, 4)), random.integers(0, 2, 12)
    means = class_means(states, labels, 3)
    for label in range(2):
        np.testing.assert_allclose(means[label], states[labels == label].mean(axis=0))
    order = random.permutation(12)
    np.testing.assert_allclose(class_means(states[order], labels[order], 3), means, rtol=1e-12)
    assert (similarities(states, means)[:, 2] == 0).all()


def test_other_objectives_are_refused(tiny_encoder_dir, labels_file, tmp_path):
    words = ["recipe=classify_lora", "eval=[prototypes]", f"model.path={tiny_encoder_dir}", f"data.path={labels_file}"]
    with pytest.raises(ConfigError, match="objective=perfect"):
        ftrun.run("train", overrides=[*words, "train.max_steps=1", "data.heldout=0.3", f"out={tmp_path / 'run'}"])
