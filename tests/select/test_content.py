"""Hashed bags of words, clusters of them, and sources."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ftrun.select.content import BAG, EMBEDDING, Content, Vocabulary, kmeans, unit, words

TEXTS = ["the dog runs and the dog barks", "a dog runs", "prices of oil rise", "oil prices", ""]


def by_hand(texts: list[str]) -> np.ndarray:
    """Cosines of tf-idf vectors over plain words, (texts, texts)."""
    bags = [text.split() for text in texts]
    rarity = {w: math.log((1 + len(texts)) / (1 + sum(w in bag for bag in bags))) for bag in bags for w in bag}
    vectors = [{w: (1 + math.log(bag.count(w))) * rarity[w] for w in set(bag)} for bag in bags]
    sizes = [math.sqrt(sum(v**2 for v in vector.values())) or 1.0 for vector in vectors]
    return np.array(
        [
            [sum(a[w] * b.get(w, 0.0) for w in a) / (x * y) for b, y in zip(vectors, sizes, strict=True)]
            for a, x in zip(vectors, sizes, strict=True)
        ]
    )


def test_nearness_is_the_cosine_of_tf_idf():
    bags = Vocabulary.of(TEXTS).bags(TEXTS)
    expected = by_hand(TEXTS)
    for row in range(len(TEXTS)):
        np.testing.assert_allclose(bags.nearness(row), expected[row], atol=1e-12)


def test_words_of_any_script():
    assert list(words("Two dogs, 17 cats; 東京 is big")) == ["two", "dogs", "17", "cats", "東", "京", "is", "big"]


def test_kmeans_finds_groups_the_largest_first():
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(8)[:3], [30, 20, 10], axis=0)
    vectors = unit(centres + 0.05 * rng.standard_normal((60, 8)))
    label = kmeans(vectors, 3, np.arange(60), seed=0)
    assert label.tolist() == [0] * 30 + [1] * 20 + [2] * 10
    assert kmeans(np.zeros((6, 4), np.float32), 3, np.arange(6), seed=0).tolist() == [0] * 6


@pytest.fixture
def mixed(make_pool):
    rows = [{"text": f"the dog barks at dog {'number ' * (i % 3)} {i}", "source": "kennel"} for i in range(12)]
    return rows + [{"text": f"oil prices rise on market {'again ' * (i % 2)} {i}"} for i in range(8)]


def test_clusters_are_the_same_in_any_order(mixed, make_pool):
    order = np.random.default_rng(1).permutation(len(mixed))
    first, second = (Content(make_pool(rows), 0).clusters(None) for rows in (mixed, [mixed[i] for i in order]))
    groups = [
        {frozenset(np.flatnonzero(label == n)) for n in set(label)} for label in (first.label[order], second.label)
    ]
    assert groups[0] == groups[1]
    assert first.by == BAG and len(first.names) == 3
    assert all(
        len(set(first.label[part]) & set(first.label[other])) == 0 for part, other in [(slice(12), slice(12, 20))]
    )


def test_cluster_names_tell_them_apart(mixed, make_pool):
    found = Content(make_pool(mixed), 0)
    vectors = np.repeat(np.eye(2), [12, 8], axis=0)
    clusters = found.clusters(vectors)
    assert clusters.by == EMBEDDING
    assert clusters.label.tolist() == [0] * 12 + [1] * 8
    assert "dog" in clusters.names[0] and "oil" in clusters.names[1]


def test_sources_are_a_field_or_nothing(mixed, make_pool):
    assert make_pool(mixed).sources == ["kennel"] * 12 + [None] * 8


def test_topics_of_a_large_pool_are_those_of_a_sample(mixed, make_pool, monkeypatch):
    """Only the sampled rows have a cluster, and which rows they are does not depend on the order of the pool."""
    monkeypatch.setattr("ftrun.select.content.FITTED", 10)
    order = np.random.default_rng(1).permutation(len(mixed))
    first, second = (Content(make_pool(rows), 0).clusters(None) for rows in (mixed, [mixed[i] for i in order]))
    assert first.rows == second.rows == 10
    np.testing.assert_array_equal(first.label[order] >= 0, second.label >= 0)
