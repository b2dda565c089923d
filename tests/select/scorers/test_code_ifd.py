"""code_ifd against its formula, computed text by text."""

from __future__ import annotations

import numpy as np
import pytest

from ftrun.data.batches import micro_batches
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.select.base import Table
from ftrun.select.scorers.code_ifd import CodeIfd
from ftrun.select.scoring.texts import read_turns


def mean_loss(bundle, plain_nll, context: list[int], target: list[int]) -> float:
    return float(plain_nll(bundle, context + target)[max(0, len(context) - 1) :].mean())


def test_ratio_of_perplexities_behind_question_and_answer(rows, make_pool, context, bundle, plain_nll):
    scores = CodeIfd().score(make_pool(rows), context())

    def ids(text: str) -> list[int]:
        return bundle.tokenizer(text, add_special_tokens=False).input_ids

    for place, row in enumerate(rows):
        if row["input"]:
            continue
        prompt, answer = ids(f"Question:\n{row['instruction']}\n\nAnswer:\n"), ids(row["output"])
        above, below = mean_loss(bundle, plain_nll, prompt, answer), mean_loss(bundle, plain_nll, [], answer)
        assert scores["ifd"][place] == pytest.approx(np.exp(above - below), rel=1e-5)


def test_rows_without_a_score_are_left_out_not_kept_at_zero(make_pool, context):
    made = [{"prompt": "what", "completion": "x"}, {"prompt": "what is that", "completion": "it is a dog"}]
    pool, ctx = make_pool(made), context()
    scores = CodeIfd().score(pool, ctx)
    assert np.isnan(scores["ifd"][0]) and "one-token" in ctx.scorer.reasons[0]
    assert not CodeIfd().keep(Table(scores, np.ones(2, np.int64)))[0]


def test_earlier_turns_are_questions_and_answers(make_pool, context, bundle):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    turns = read_turns(make_pool([{"messages": messages}]), context(), "question")
    expected = "be brief\n\nQuestion:\none\n\nAnswer:\ntwo\n\nQuestion:\nthree\n\nAnswer:\n"
    assert turns.prompt[1] == bundle.tokenizer(expected, add_special_tokens=False).input_ids
    assert turns.answer_mark == []


@pytest.mark.parametrize("more", [0, 7, 100])
def test_packing_loses_no_token_and_no_row_is_too_long(more):
    """Ids and weights of every sample stand together in one row of a batch, whatever the room beyond the longest."""
    random = np.random.default_rng(more)
    made = [
        Sequence(random.integers(1, 9, n).astype(np.int32), random.integers(0, 2, n).astype(np.float32), number)
        for number, n in enumerate(random.integers(2, 40, 30))
    ]
    table = TokenTable.from_sequences(made)
    limit = int(table.lengths.max()) + more
    found, rows = [], 0
    for batch in micro_batches(table, np.arange(30), limit, True, 0):
        assert batch.input_ids.shape[1] <= limit
        rows += len(batch.input_ids)
        for row, start, end in batch.spans():
            found.append((batch.input_ids[row, start:end].tolist(), batch.loss_weight[row, start:end].tolist()))
            assert batch.position_ids[row, start:end].tolist() == list(range(end - start))
    assert rows < 30
    assert sorted(found) == sorted((item.input_ids.tolist(), item.loss_weight.tolist()) for item in made)
