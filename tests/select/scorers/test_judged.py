"""ppl_response, selectit and select2reason against their formulas, computed text by text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ftrun.errors import ConfigError, DataError
from ftrun.models.fast import speed_up
from ftrun.select.scorers.ppl_response import PplResponse
from ftrun.select.scorers.select2reason import Select2Reason, rank_share, share_of_top, trace_of, without_repeats
from ftrun.select.scorers.selectit import RATING_PROMPTS, SelectIt, rating
from ftrun.select.scoring.next_token import chat_prompt, next_token, word_ids
from ftrun.select.trials.rollouts import rollouts


def ids(bundle, text: str) -> list[int]:
    return bundle.tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture
def following(bundle):
    """Probabilities of the token behind a text, at batch size 1."""

    def probabilities(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return bundle.model(torch.tensor([tokens])).logits[0, -1].double().softmax(-1).numpy()

    return probabilities


# ---- the next token ----


@pytest.mark.parametrize("fast", [False, True])
def test_next_token_is_what_the_model_says_of_each_text(context, bundle, following, fast):
    if fast:
        speed_up(bundle.model)  # texts then share rows of a batch
    texts = [ids(bundle, "what is 1"), ids(bundle, "the quick brown fox jumps"), ids(bundle, "no")]
    found = next_token(texts, [[20], [30, 31]], context(), "ask")
    for row, text in enumerate(texts):
        p = following(text)
        np.testing.assert_allclose(found.asked[row], [p[20], p[30] + p[31]], rtol=1e-4)
        assert found.top_ids[row].tolist() == np.argsort(-p)[:2].tolist()
        np.testing.assert_allclose(found.top[row], np.sort(p)[::-1][:2], rtol=1e-4)


def test_words_are_looked_up_with_and_without_a_blank(bundle):
    for digit in "12345":
        found = word_ids(bundle.tokenizer, digit)
        assert found and all(bundle.tokenizer.decode([token]).strip() == digit for token in found)
    with pytest.raises(ConfigError, match="no token"):
        word_ids(bundle.tokenizer, "zebra")


def test_without_a_template_the_question_is_plain_lines(bundle):
    assert "<|im_start|>" in bundle.tokenizer.decode(chat_prompt(bundle.tokenizer, "system", "user"))
    bundle.tokenizer.chat_template = None
    assert chat_prompt(bundle.tokenizer, "a", "b") == ids(bundle, "a\n\nb\n\nAnswer:")


# ---- ppl_response ----


def test_the_perplexity_of_the_response(rows, make_pool, context, bundle, plain_nll):
    scores = PplResponse(template="plain").score(make_pool(rows), context())
    for place, row in enumerate(rows):
        prompt = ids(bundle, row["instruction"] + "\n" + (row["input"] + "\n" if row["input"] else ""))
        loss = plain_nll(bundle, prompt + ids(bundle, row["output"]))[len(prompt) - 1 :].mean()
        assert scores["loss"][place] == pytest.approx(loss, rel=1e-5)
        assert scores["ppl"][place] == pytest.approx(math.exp(loss), rel=1e-5)


def test_the_side_decides_what_ranks_first(rows, make_pool, context):
    pool = make_pool(rows)
    high, low, middle = (PplResponse(side=side).score(pool, context()) for side in ("highest", "lowest", "middle"))
    np.testing.assert_array_equal(high["ppl_response"], high["ppl"])
    np.testing.assert_array_equal(low["ppl_response"], -high["ppl"])
    best = int(np.argmax(middle["ppl_response"]))
    assert abs(high["loss"][best] - np.median(high["loss"])) == np.abs(high["loss"] - np.median(high["loss"])).min()


def test_answers_that_cannot_be_scored_are_named(make_pool, context):
    ctx = context()
    pool = make_pool([{"prompt": "word " * 30, "completion": "yes"}, {"prompt": "a", "completion": "yes"}])
    scores = PplResponse(template="plain", max_length=20).score(pool, ctx)
    assert np.isnan(scores["ppl_response"]).tolist() == [True, False]
    assert ctx.scorer.reasons == {0: "the prompt fills max_length=20"}


# ---- selectit ----


def test_rating_by_hand():
    p = np.array([0.1, 0.05, 0.2, 0.05, 0.1])
    q = [math.exp(x / 0.5) for x in p]
    q = [x / sum(q) for x in q]
    expected = 3 * sum(q[2] - x for k, x in enumerate(q) if k != 2) / 4
    assert rating(p) == pytest.approx(expected, rel=1e-12)


def test_ratings_lie_between_nought_and_the_bound():
    random = np.random.default_rng(0)
    values = rating(random.dirichlet(np.full(5, 0.3), 500))
    bound = 5 * (math.e - 1) / (math.e + 4)
    assert values.min() >= 0 and values.max() <= bound
    assert rating(np.eye(5)[4]) == pytest.approx(bound)
    assert rating(np.full(5, 0.2)) == pytest.approx(0, abs=1e-12)


def test_selectit_is_the_formula(rows, make_pool, context, bundle, following):
    few = rows[:4]
    scores = SelectIt(prompts=3).score(make_pool(few), context())
    digits = [word_ids(bundle.tokenizer, digit) for digit in "12345"]
    for place, row in enumerate(few):
        instruction = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        of_prompts = []
        for question in RATING_PROMPTS[:3]:
            asked = f"Instruction:\n{instruction}\n\nResponse:\n{row['output']}"
            p = following(chat_prompt(bundle.tokenizer, f"{question} Write the number only.", asked))
            p = np.array([p[group].sum() for group in digits])
            q = np.exp(p / p.sum()) / np.exp(p / p.sum()).sum()
            others = [q.max() - value for value in np.delete(q, q.argmax())]
            of_prompts.append((q.argmax() + 1) * np.mean(others))
        assert scores["selectit"][place] == pytest.approx(
            np.mean(of_prompts) / (1 + 0.2 * np.std(of_prompts)), rel=1e-3
        )
        assert scores["rating"][place] == pytest.approx(np.mean(of_prompts), rel=1e-3)


def test_long_responses_are_cut_and_told(make_pool, context):
    ctx = context()
    pool = make_pool([{"prompt": "a", "completion": "yes " * 50}, {"prompt": "a " * 50, "completion": "yes"}])
    scores = SelectIt(prompts=1, max_length=20).score(pool, ctx)
    assert np.isnan(scores["selectit"]).tolist() == [False, True]
    assert ctx.scorer.reasons == {1: "the prompt fills max_length=20"}
    assert "1 of 1 responses are rated up to" in ctx.report.console.file.getvalue()


@pytest.mark.parametrize("knobs", [{"prompts": 0}, {"prompts": 6}, {"alpha": -0.1}], ids=repr)
def test_selectit_refuses_what_it_cannot_ask(knobs):
    with pytest.raises(ConfigError):
        SelectIt(**knobs)


def test_selectit_averages_over_the_answers_of_a_row(make_pool, context):
    first = [{"role": "user", "content": "what is 1"}, {"role": "assistant", "content": "yes"}]
    second = [{"role": "user", "content": "what is 2"}, {"role": "assistant", "content": "the lazy dog"}]
    both = SelectIt(prompts=2).score(make_pool([{"messages": [*first, *second]}]), context())["selectit"]
    asked = [{"prompt": "what is 1", "completion": "yes"}]
    asked += [{"prompt": "what is 1\n\nyes\n\nwhat is 2", "completion": "the lazy dog"}]
    apart = SelectIt(prompts=2).score(make_pool(asked), context())["selectit"]
    assert both[0] == pytest.approx(apart.mean(), rel=1e-4)


# ---- select2reason ----


def reasoning() -> list[dict[str, object]]:
    made = []
    for i in range(8):
        steps = "\n".join(f"step {k}" for k in range(1 + (5 * i) % 8))
        made.append({"prompt": f"what is {i}", "completion": f"<think>{steps}</think> {i}", "level": [3, 1, 2][i % 3]})
    return made


def test_repeated_steps_count_once():
    assert without_repeats("a\n b \n\na\nb\nc\na") == "a\nb\nc"
    assert trace_of("<think>\nmany words\n</think>answer") == "\nmany words\n"
    assert trace_of("<think>cut off") == "cut off"
    assert trace_of("no marks") == "no marks"


def test_ranks_are_shares_and_ties_are_equal():
    assert rank_share(np.array([5.0, 1.0, 3.0])).tolist() == [1, 0, 0.5]
    assert rank_share(np.array([2.0, 2.0, 1.0])).tolist() == [0.75, 0.75, 0]
    values = np.random.default_rng(0).normal(size=50)
    np.testing.assert_array_equal(rank_share(values), rank_share(np.exp(values)))
    assert rank_share(np.array([7.0])).tolist() == [0]


def test_difficulty_is_the_share_of_one_in_the_two_likeliest():
    top, found = np.array([[0.6, 0.3], [0.6, 0.3], [0.5, 0.4]]), np.array([[7, 1], [1, 9], [8, 9]])
    np.testing.assert_allclose(share_of_top(top, found, [1, 7]), [1, 0.6 / 0.9, 0])


def test_the_judge_is_asked_about_the_question(make_pool, context, bundle, following):
    scores = Select2Reason().score(make_pool(reasoning()), context())
    from ftrun.select.scorers.select2reason import JUDGE

    ones = word_ids(bundle.tokenizer, "1")
    for i, difficulty in enumerate(scores["difficulty"]):
        p = following(chat_prompt(bundle.tokenizer, JUDGE, f"what is {i}"))
        first, second = np.argsort(-p)[:2]
        expected = sum(p[token] for token in (first, second) if token in ones) / (p[first] + p[second])
        assert difficulty == pytest.approx(expected, rel=1e-3) and 0 <= difficulty <= 1


def test_the_weight_goes_from_length_to_difficulty(make_pool, context, bundle):
    pool = make_pool(reasoning())
    made = {w: Select2Reason(w=w, difficulty="column", field="level").score(pool, context()) for w in (0.0, 0.25, 1.0)}
    lengths = [len(ids(bundle, "\n".join(f"step {k}" for k in range(1 + (5 * i) % 8)))) for i in range(8)]
    np.testing.assert_array_equal(made[0.0]["length"], lengths)
    np.testing.assert_array_equal(np.argsort(-made[0.0]["select2reason"]), np.argsort(-np.array(lengths)))
    levels = np.array([[3, 1, 2][i % 3] for i in range(8)])
    np.testing.assert_array_equal(rank_share(made[1.0]["select2reason"]), rank_share(levels))
    mixed = 0.25 * rank_share(levels) + 0.75 * rank_share(np.array(lengths))
    np.testing.assert_allclose(made[0.25]["select2reason"], mixed)


def test_the_pass_rate_is_what_the_answers_score(make_pool, context, bundle):
    rows = [
        {"instruction": "what is 1", "output": "1", "answer": "1"},
        {"instruction": "what is 1", "output": "77", "answer": "77"},
    ]
    ctx = context()
    scorer = Select2Reason(difficulty="pass_rate", rollouts=4, max_new_tokens=6)
    scores = scorer.score(make_pool(rows), ctx)
    from ftrun.data.answers import check_of
    from ftrun.data.render import Renderer

    pool = make_pool(rows)
    prompt = Renderer(bundle.tokenizer).prompt_ids(pool[0])
    answers = rollouts([prompt], 4, 6, 1.0, context())[0]
    assert len(answers) == 4 and len(set(answers)) > 1
    for row in range(2):
        check = check_of(pool[row], "auto", "")
        assert scores["difficulty"][row] == 1 - np.mean([check.score(answer) for answer in answers])


def test_rows_that_no_rollout_can_be_checked_on_are_named(make_pool, context):
    """A trace is no answer: nothing that the model writes would repeat it to the letter."""
    rows = [{"prompt": "what is 1", "completion": "<think>one</think> 1"}]
    rows += [{"prompt": "what is 2", "completion": "<think>two</think> 2", "answer": "2"}]
    ctx = context()
    scorer = Select2Reason(difficulty="pass_rate", rollouts=1, max_new_tokens=2)
    scores = scorer.score(make_pool(rows), ctx)
    assert np.isnan(scores["select2reason"]).tolist() == [True, False]
    assert ctx.scorer.reasons == {0: "no verifier, and no answer to compare rollouts with"}


def test_a_plan_counts_what_the_judge_reads_and_the_model_writes():
    lengths = np.full(10, 30)
    assert Select2Reason().planned_tokens(lengths) == 300
    assert Select2Reason(difficulty="column").planned_tokens(lengths) == 0
    asked = Select2Reason(difficulty="pass_rate", rollouts=4, max_new_tokens=100)
    assert asked.planned_tokens(lengths) == 300 + 10 * 4 * 100
    assert SelectIt(prompts=3).planned_tokens(lengths) == 900


def test_rollouts_do_not_depend_on_company(context, bundle):
    prompts = [ids(bundle, "what is 1"), ids(bundle, "the quick brown fox"), ids(bundle, "no")]
    together = rollouts(prompts, 2, 5, 1.0, context())
    assert [rollouts([prompt], 2, 5, 1.0, context())[0] for prompt in prompts] == together
    with pytest.raises(DataError, match="no room"):
        rollouts(prompts, 1, 5000, 1.0, context())


def test_a_missing_or_wrong_difficulty_is_named(make_pool, context):
    rows = reasoning()
    del rows[0]["level"]
    ctx = context()
    scores = Select2Reason(difficulty="column", field="level").score(make_pool(rows), ctx)
    assert np.isnan(scores["select2reason"][0]) and ctx.scorer.reasons == {0: 'no field "level"'}
    for wrong in ("hard", "nan", [1]):
        rows[0]["level"] = wrong
        with pytest.raises(DataError, match="no number"):
            Select2Reason(difficulty="column", field="level").score(make_pool(rows), context())


@pytest.mark.parametrize(
    "knobs", [{"w": 1.5}, {"rollouts": 0}, {"max_new_tokens": 0}, {"max_length": 0}, {"temperature": -1.0}], ids=repr
)
def test_select2reason_names_the_knob_that_is_wrong(knobs):
    with pytest.raises(ConfigError) as error:
        Select2Reason(**knobs)
    assert error.value.where.startswith(f"select.{next(iter(knobs))}=")
