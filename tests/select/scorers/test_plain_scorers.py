"""random and longest."""

from __future__ import annotations

import numpy as np

from ftrun.select.scorers.longest import Longest
from ftrun.select.scorers.random import Random


def test_random_numbers_follow_the_row_not_its_place(rows, make_pool, context):
    order = np.random.default_rng(0).permutation(len(rows))
    numbers = Random().score(make_pool(rows), context())["random"]
    shuffled = Random().score(make_pool([rows[i] for i in order]), context())["random"]
    np.testing.assert_array_equal(shuffled, numbers[order])
    assert len(set(numbers.tolist())) == len(rows)


def test_random_depends_on_the_seed_and_repeats(rows, make_pool, context):
    first, again, other = (Random().score(make_pool(rows), context(seed=seed))["random"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_random_is_uniform(make_pool, context):
    numbers = Random().score(make_pool([{"text": f"row {i}"} for i in range(4000)]), context())["random"]
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_copies_of_a_row_are_drawn_apart(make_pool, context):
    numbers = Random().score(make_pool([{"text": "the same"}] * 5), context())["random"]
    assert len(set(numbers.tolist())) == 5


def test_longest_counts_tokens(rows, make_pool, context, bundle):
    tokens = bundle.tokenizer
    total = Longest().score(make_pool(rows), context())["tokens"]
    response = Longest(of="response").score(make_pool(rows), context())["tokens"]
    for place, row in enumerate(rows):
        answer = len(tokens(row["output"]).input_ids)
        prompt = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        assert response[place] == answer
        assert total[place] == answer + len(tokens(prompt).input_ids)


def test_longest_response_needs_one(make_pool, context):
    ctx = context()
    scores = Longest(of="response").score(make_pool([{"text": "a text"}]), ctx)["tokens"]
    assert np.isnan(scores).all()
    assert ctx.scorer.reasons == {0: "no response"}
