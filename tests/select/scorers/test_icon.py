"""icon against its formulas, computed pair by pair."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ftrun.config.settings import DataConfig, SelectConfig
from ftrun.errors import ComponentError, ConfigError, DataError
from ftrun.select.scorers import icon
from ftrun.select.scorers.icon import Icon, first_difference, label, random_text, squashed
from ftrun.select.trials import incontext


@pytest.fixture
def assessed(context, tmp_path):
    """A context whose assessment set is these rows."""

    def make(rows, budget=0.25, **settings):
        file = tmp_path / f"assess{len(rows)}.jsonl"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        if not file.exists() or file.read_text() != lines:
            file.write_text(lines)
        shared = SelectConfig(queries=[str(file)])
        return context(select="icon", shared=shared, data=DataConfig(path="-"), budget=budget, **settings)

    return make


@pytest.fixture
def perplexity(bundle, plain_nll):
    """exp(mean nll) of a row's answer after its prompt and what stands before, at batch size 1."""

    def ids(text: str) -> list[int]:
        return bundle.tokenizer(text, add_special_tokens=False).input_ids

    def one(row, before: str | None = None) -> float:
        context = ids(prompt_of(row)) if before is None else ids(before) + ids("\n\n\n") + ids(prompt_of(row))
        target = ids(row["output"])
        return float(np.exp(plain_nll(bundle, context + target)[len(context) - 1 :].mean()))

    return one


def prompt_of(row) -> str:
    said = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
    return f"### Instruction:\n{said}\n\n### Response:\n"


def text_of(row) -> str:
    return prompt_of(row) + row["output"]


def test_contribution_is_the_help_beyond_random_text(rows, make_pool, assessed, perplexity):
    candidates, tests = rows[:4], rows[10:13]
    ctx = assessed(tests)
    found = Icon().contributions([(prompt_of(row), row["output"]) for row in candidates], ctx)
    for place, row in enumerate(candidates):
        scores = []
        for test in tests:
            noise = random_text(text_of(row), text_of(test), 0)
            gain = perplexity(test, noise) - perplexity(test, text_of(row))
            scores.append(gain / (perplexity(test) + 1e-6))
        mean = np.mean(scores)
        expected = np.sign(mean) if abs(mean) > 0.5 else 2 / (1 + np.exp(-50 * mean)) - 1
        assert found[place] == pytest.approx(expected, abs=1e-3)


def test_the_first_version_is_the_fall_in_perplexity(rows, assessed, perplexity):
    candidates, tests = rows[:4], rows[10:13]
    scorer = Icon(version="icon_v1")
    found = scorer.contributions([(prompt_of(row), row["output"]) for row in candidates], assessed(tests))
    for place, row in enumerate(candidates):
        expected = np.mean([perplexity(test) - perplexity(test, text_of(row)) for test in tests])
        assert found[place] == pytest.approx(expected, rel=1e-3, abs=1e-2)


def test_random_text_as_demonstration_contributes_nothing(rows, assessed, monkeypatch):
    monkeypatch.setattr(icon, "random_text", lambda demonstration, test, seed: demonstration)
    found = Icon().contributions([(prompt_of(row), row["output"]) for row in rows[:3]], assessed(rows[10:12]))
    np.testing.assert_array_equal(found, 0)


def test_demonstrations_are_made_block_by_block(rows, assessed, monkeypatch):
    """Candidates times assessment rows of them never are in memory together, and the cut does not matter."""
    candidates = [(prompt_of(row), row["output"]) for row in rows[:5]]
    whole, encode, read = Icon().contributions(candidates, assessed(rows[10:13])), icon.encode, []

    def counted(tokenizer, texts):
        read.append(len(texts))
        return encode(tokenizer, texts)

    monkeypatch.setattr(icon, "encode", counted)
    monkeypatch.setattr(incontext, "BLOCK_TOKENS", 1)
    np.testing.assert_allclose(Icon().contributions(candidates, assessed(rows[10:13])), whole, atol=1e-4)
    assert max(read) == 5 and read.count(3) == 5  # random texts of one candidate after the other


def test_a_long_demonstration_is_cut_and_told(rows, assessed, perplexity, bundle):
    test, row, ctx = rows[10], rows[5], assessed(rows[10:11])
    found = Icon(version="icon_v1", demonstration_length=7).contributions([(prompt_of(row), row["output"])], ctx)
    ids = bundle.tokenizer(text_of(row), add_special_tokens=False).input_ids[:7]
    expected = perplexity(test) - perplexity(test, bundle.tokenizer.decode(ids))
    assert found[0] == pytest.approx(expected, rel=1e-3, abs=1e-2)
    assert "1 of 1 demonstrations are cut at 7 tokens" in ctx.report.console.file.getvalue()


def test_rows_that_cannot_assess_are_told(rows, assessed):
    ctx = assessed([*rows[10:12], {"instruction": "word " * 40, "input": "", "output": "yes"}])
    Icon(max_length=60).contributions([(prompt_of(rows[0]), rows[0]["output"])], ctx)
    said = " ".join(ctx.report.console.file.getvalue().split())
    assert "1 rows of select.queries do not assess: no response, or over 60 tokens" in said
    assert "1 candidates x 2 rows" in said


def test_answers_are_told_apart_behind_a_common_blank():
    assert first_difference([7, 8], [7, 9]) == [8, 9]
    assert first_difference([5], [6, 1]) == [5, 6]


def test_random_text_is_as_long_and_repeats():
    text = random_text("a demonstration", "a test", 0)
    assert len(text) == len("a demonstration") and text == random_text("a demonstration", "a test", 0)
    others = [random_text("a demonstration", "a test", 1), random_text("a demonstration", "b test", 0)]
    assert text not in others and set(random_text("x" * 9999, "", 0)) == set(icon.NOISE)


def test_squashing_keeps_the_order_and_its_bounds():
    mean = np.linspace(-0.12, 0.12, 101)
    assert (np.diff(squashed(mean)) > 0).all()
    assert squashed(np.array([0.0, 0.6, -7.0])).tolist() == [0, 1, -1]
    assert squashed(np.array([0.01]))[0] == pytest.approx(np.tanh(0.25))


@pytest.mark.parametrize("share", [0.1, 0.15, 0.5])
def test_as_many_are_helpful_as_asked(share):
    contribution = np.random.default_rng(0).normal(size=200)
    helpful = label(contribution, share)
    assert helpful.sum() == pytest.approx(share * 200, abs=1)
    assert contribution[helpful].min() > contribution[~helpful].max()


def test_the_pool_gets_probabilities_and_the_candidates_contributions(rows, make_pool, assessed):
    ctx = assessed(rows[20:22])
    scores = Icon(candidates=10, classifier_batch_size=4).score(make_pool(rows[:20]), ctx)
    assert ((scores["icon"] > 0) & (scores["icon"] < 1)).all()
    assert (~np.isnan(scores["contribution"])).sum() == 10
    said = ctx.report.console.file.getvalue()
    assert "the contribution of 10 of 20 rows is measured" in said
    assert "10 candidates x 2 rows = 20 forward passes over" in said


def test_the_classifier_learns_what_helps(rows, make_pool, assessed, monkeypatch):
    """Where contribution follows from the text, rows that were not measured are told apart too."""
    pool_rows = [
        {"instruction": f"what is {i}", "input": "", "output": "yes yes yes yes" if i % 2 else "the lazy dog"}
        for i in range(40)
    ]
    monkeypatch.setattr(
        Icon, "contributions", lambda self, rows, ctx: np.array([float("yes yes" in answer) for _, answer in rows])
    )
    scorer = Icon(
        candidates=20, helpful=0.5, classifier_epochs=12, classifier_learning_rate=2e-2, classifier_batch_size=4
    )
    ctx = assessed(rows[:2])
    scores = scorer.score(make_pool(pool_rows), ctx)
    unmeasured = np.isnan(scores["contribution"])
    odd = np.arange(40) % 2 == 1
    assert scores["icon"][unmeasured & odd].min() > scores["icon"][unmeasured & ~odd].max()


def test_the_model_is_put_back(rows, make_pool, assessed, bundle):
    import torch

    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    Icon(candidates=6, classifier_batch_size=4).score(make_pool(rows[:8]), assessed(rows[20:22]))
    after = bundle.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_order_does_not_matter(rows, make_pool, assessed):
    order = np.random.default_rng(0).permutation(12)
    scorer = Icon(candidates=6, classifier_batch_size=4)
    plain = scorer.score(make_pool(rows[:12]), assessed(rows[20:22]))
    shuffled = scorer.score(make_pool([rows[i] for i in order]), assessed(rows[20:22]))
    np.testing.assert_allclose(shuffled["contribution"], plain["contribution"][order], atol=1e-4)
    np.testing.assert_allclose(shuffled["icon"], plain["icon"][order], atol=1e-5)


def test_rows_with_links_are_no_candidates_but_are_scored(rows, make_pool, assessed):
    linked = [dict(row, instruction=row["instruction"] + " https://x.org") for row in rows[:4]]
    scores = Icon(classifier_batch_size=4).score(make_pool([*linked, *rows[4:12]]), assessed(rows[20:22]))
    assert np.isnan(scores["contribution"]).tolist() == [True] * 4 + [False] * 8
    assert not np.isnan(scores["icon"]).any()


def test_a_pool_without_responses_is_refused(rows, make_pool, assessed):
    ctx = assessed(rows[20:22])
    with pytest.raises(DataError, match="no row whose contribution"):
        Icon().score(make_pool([{"text": "no turns here"}]), ctx)
    assert ctx.scorer.reasons == {0: "no response"}


def test_a_model_that_ignores_its_context_teaches_nothing(rows, make_pool, assessed, bundle):
    for parameter in bundle.model.parameters():
        parameter.data.zero_()
    with pytest.raises(ComponentError, match="contribute alike"):
        Icon().score(make_pool(rows[:6]), assessed(rows[20:22]))


def test_a_token_budget_needs_a_share(rows, make_pool, assessed):
    with pytest.raises(ConfigError, match=r"select\.helpful"):
        Icon().score(make_pool(rows[:6]), assessed(rows[20:22], budget="1k_tokens"))


def test_an_assessment_set_of_long_rows_is_refused(rows, assessed):
    with pytest.raises(DataError, match="at most 3 tokens"):
        Icon(max_length=3).contributions([("a", "b")], assessed(rows[20:22]))


def test_a_plan_counts_pairs():
    lengths = np.full(500, 100)
    assert Icon(candidates=40, assessment=10).planned_tokens(lengths) == 500 * 100 + 40 * 10 * 2 * 200
    assert Icon(candidates=40, assessment=10, version="icon_v1").planned_tokens(lengths) == 500 * 100 + 40 * 10 * 200
