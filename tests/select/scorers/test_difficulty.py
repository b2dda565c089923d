"""ifd and superfiltering against their formulas, computed text by text."""

from __future__ import annotations

import numpy as np
import pytest

from ftrun.select.base import Table
from ftrun.select.scorers.ifd import Ifd
from ftrun.select.scorers.superfiltering import Superfiltering
from ftrun.select.scoring.texts import added_ids

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


def ids(bundle, text: str) -> list[int]:
    return bundle.tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture
def loop(bundle, plain_nll):
    """Mean loss of ``target`` after ``context``, at batch size 1."""

    def mean(context: list[int], target: list[int]) -> float:
        losses = plain_nll(bundle, context + target)[max(0, len(context) - 1) :]
        return float(losses.mean()) if len(losses) else float("nan")

    return mean


def test_superfiltering_is_the_ratio_of_perplexities(rows, make_pool, context, bundle, loop):
    scores = Superfiltering().score(make_pool(rows), context())
    for place, row in enumerate(rows):
        prompt = row["instruction"] + "\n" + (row["input"] + "\n" if row["input"] else "")
        above, below = loop(ids(bundle, prompt), ids(bundle, row["output"])), loop([], ids(bundle, row["output"]))
        assert scores["ifd"][place] == pytest.approx(np.exp(above) / np.exp(below), rel=1e-5)
        assert scores["conditional"][place] == pytest.approx(np.exp(above), rel=1e-5)
        assert scores["direct"][place] == pytest.approx(np.exp(below), rel=1e-5)


def test_ifd_is_the_ratio_of_losses_in_the_alpaca_layout(rows, make_pool, context, bundle, loop):
    scores = Ifd().score(make_pool(rows), context())
    plain = [place for place, row in enumerate(rows) if not row["input"]]
    for place in plain:
        row = rows[place]
        prompt = f"{ALPACA}### Instruction:\n{row['instruction']}\n\n### Response:"
        above = loop(ids(bundle, prompt), ids(bundle, row["output"]))
        below = loop(ids(bundle, "### Response:"), ids(bundle, row["output"]))
        assert scores["ifd"][place] == pytest.approx(above / below, rel=1e-5)


def test_the_input_has_its_own_heading(make_pool, context, bundle, loop):
    row = {"instruction": "add", "input": "1 and 2", "output": "that is 3"}
    head = ALPACA.replace("task. ", "task, paired with an input that provides further context. ")
    prompt = f"{head}### Instruction:\nadd\n\n### Input:\n1 and 2\n\n### Response:"
    score = Ifd().score(make_pool([row]), context())
    assert score["conditional"][0] == pytest.approx(loop(ids(bundle, prompt), ids(bundle, "that is 3")), rel=1e-5)


def test_a_model_that_ignores_its_context_gives_one(rows, make_pool, context, bundle):
    for parameter in bundle.model.parameters():
        parameter.data.zero_()  # equal logits everywhere
    scores = Ifd().score(make_pool(rows), context())
    np.testing.assert_allclose(scores["ifd"], 1, atol=1e-6)


def test_one_token_and_empty_responses(make_pool, context, bundle):
    token = bundle.tokenizer.decode([ids(bundle, "yes")[0]])
    assert len(ids(bundle, token)) == 1
    pool = make_pool([{"prompt": "a", "completion": token}, {"prompt": "a", "completion": "yes no yes"}])
    ctx = context()
    scores = Superfiltering().score(pool, ctx)
    assert np.isnan(scores["ifd"]).tolist() == [True, False]
    assert ctx.scorer.reasons == {0: "a one-token response has no direct loss"}
    # after "### Response:" the one token has something to be predicted from
    assert np.isfinite(Ifd().score(pool, context())["ifd"]).all()


def test_rows_without_a_response_have_no_score(make_pool, context):
    ctx = context()
    scores = Superfiltering().score(make_pool([{"text": "no turns here"}]), ctx)
    assert np.isnan(scores["ifd"]).all()
    assert ctx.scorer.reasons == {0: "no response"}


def test_more_rows_do_not_change_a_score(rows, make_pool, context):
    few, many = (Superfiltering().score(make_pool(part), context())["ifd"] for part in (rows[:5], rows))
    np.testing.assert_allclose(few, many[:5], atol=1e-6)


@pytest.mark.parametrize("scorer", [Ifd(max_length=160), Superfiltering(max_length=30)])
def test_truncation_scores_the_same_tokens_on_both_sides(make_pool, context, bundle, loop, scorer):
    row = {"instruction": "what is this", "output": "yes no " * 40}
    ctx = context()
    score = scorer.score(make_pool([row]), ctx)
    alpaca = isinstance(scorer, Superfiltering) is False
    prompt = ids(bundle, f"{ALPACA}### Instruction:\nwhat is this\n\n### Response:" if alpaca else "what is this\n")
    assert len(prompt) + 10 < scorer.max_length
    kept = ids(bundle, row["output"])[: scorer.max_length - len(prompt)]
    mark = ids(bundle, "### Response:") if alpaca else []
    above, below = loop(prompt, kept), loop(mark, kept)
    assert score["ifd"][0] == pytest.approx(above / below if alpaca else np.exp(above - below), rel=1e-5)
    assert "1 of 1 responses are scored up to" in ctx.report.console.file.getvalue()


def test_the_reference_rule_has_one_token_more_below(make_pool, context, bundle, loop):
    row = {"instruction": "what is this", "output": "yes no " * 40}
    room = 30 - len(ids(bundle, "what is this\n"))
    target = ids(bundle, row["output"])
    score = Superfiltering(max_length=30, truncation="reference").score(make_pool([row]), context())
    assert score["direct"][0] == pytest.approx(np.exp(loop([], target[: room + 1])), rel=1e-5)
    assert score["conditional"][0] == pytest.approx(
        np.exp(loop(ids(bundle, "what is this\n"), target[:room])), rel=1e-5
    )


def test_untruncated_the_rules_agree(rows, make_pool, context):
    both = [Superfiltering(truncation=rule).score(make_pool(rows), context())["ifd"] for rule in ("equal", "reference")]
    np.testing.assert_array_equal(*both)


def test_a_prompt_that_fills_the_length_is_named(make_pool, context):
    ctx = context()
    score = Superfiltering(max_length=8).score(make_pool([{"instruction": "word " * 30, "output": "yes no"}]), ctx)
    assert np.isnan(score["ifd"][0])
    assert ctx.scorer.reasons == {0: "the prompt fills max_length=8"}


def test_a_tokenizer_that_adds_a_bos_gives_the_first_token_a_loss(make_pool, context, bundle, loop):
    from tokenizers.processors import TemplateProcessing

    bos = bundle.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    bundle.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    assert added_ids(bundle.tokenizer) == ([bos], [])
    row = {"instruction": "what is this", "output": "yes no yes"}
    score = Superfiltering().score(make_pool([row]), context())
    target = ids(bundle, row["output"])
    assert score["direct"][0] == pytest.approx(np.exp(loop([bos], target)), rel=1e-5)
    assert score["conditional"][0] == pytest.approx(
        np.exp(loop([bos, *ids(bundle, "what is this\n")], target)), rel=1e-5
    )


def test_several_answers_count_by_their_mean(make_pool, context, bundle, loop):
    turns = [("user", "what is 1"), ("assistant", "that is 1"), ("user", "what is 2"), ("assistant", "yes that is 2")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    score = Superfiltering().score(make_pool([row]), context())
    expected = []
    for before, answer in (("what is 1\n", "that is 1"), ("what is 1\nthat is 1\nwhat is 2\n", "yes that is 2")):
        target = ids(bundle, answer)
        expected.append(np.exp(loop(ids(bundle, before), target) - loop([], target)))
    assert score["ifd"][0] == pytest.approx(np.mean(expected), rel=1e-5)


def test_the_chat_template_introduces_the_answer(make_pool, context, bundle, loop):
    row = {"instruction": "what is 1", "output": "that is 1"}
    score = Ifd(template="chat").score(make_pool([row]), context())
    target = ids(bundle, "that is 1")
    above = loop(ids(bundle, "<|im_start|>user\nwhat is 1<|im_end|>\n<|im_start|>assistant\n"), target)
    assert score["ifd"][0] == pytest.approx(above / loop(ids(bundle, "<|im_start|>assistant\n"), target), rel=1e-5)


def test_a_preference_row_counts_with_its_chosen_answer(make_pool, context):
    pair = {"prompt": "what is 1", "chosen": "that is 1", "rejected": "no no no"}
    single = {"prompt": "what is 1", "completion": "that is 1"}
    both = [Superfiltering().score(make_pool([row]), context())["ifd"][0] for row in (pair, single)]
    assert both[0] == both[1]


def test_the_filters_differ_at_exactly_one():
    table = Table({"ifd": np.array([0.5, 1.0, 1.5, np.nan])}, np.ones(4, np.int64))
    assert Ifd().keep(table).tolist() == [True, True, False, False]
    assert Superfiltering().keep(table).tolist() == [True, False, False, False]
