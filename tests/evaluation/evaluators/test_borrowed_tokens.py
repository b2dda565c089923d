"""Shifted tokens looked up in the nearest training responses."""

from __future__ import annotations

import numpy as np
import pytest
from made_up_rows import Rows

from ftrun.data.records import Message, Record
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.evaluators import borrowed_tokens as module
from ftrun.evaluation.evaluators.borrowed_tokens import BorrowedTokens, borrowed
from ftrun.evaluation.shifts import Answer, Comparison


def answer(id: int, tokens: list[int], rank: list[int]) -> Answer:
    zeros = np.zeros(len(tokens))
    return Answer(id, "", np.array(tokens, np.int64), np.array(rank), zeros, zeros)


def trained(bundle, *texts: str) -> TokenTable:
    """A table with one response a text, after a prompt of one token."""
    sequences = []
    for row, text in enumerate(texts):
        ids = [4, *bundle.tokenizer(text).input_ids]
        weight = np.ones(len(ids), np.float32)
        weight[0] = 0
        sequences.append(Sequence(np.array(ids, np.int32), weight, row))
    return TokenTable.from_sequences(sequences)


@pytest.fixture
def given(monkeypatch, bundle):
    """Fixed answers, and the tiny model as the encoder."""

    def make(*answers: Answer) -> None:
        monkeypatch.setattr(Comparison, "answers", lambda *_: list(answers))
        monkeypatch.setattr(module, "_encoder", lambda _ctx: bundle)

    return make


def test_a_token_is_borrowed_where_a_response_holds_it():
    found = borrowed(np.array([5, 6, 7]), [np.array([7, 9]), np.array([5])])
    assert found.tolist() == [True, False, True]
    assert not borrowed(np.array([5, 6]), []).any()


def test_shares_of_shifted_and_other_tokens(bundle, context, given):
    fox, dog = (bundle.tokenizer(text).input_ids for text in ("the quick brown fox", "lazy dog"))
    given(answer(0, [*fox, dog[0]], [9, 1, 9, *[1] * (len(fox) - 3), 9]))
    table = trained(bundle, "the quick brown fox", "answers: yes no 8 9")
    found = BorrowedTokens(k=1).evaluate(bundle, context(train_tokens=table))
    assert found.predictions[0]["nearest"] == ["the quick brown fox"]
    assert found.metrics["borrowed"].value == pytest.approx(2 / 3)  # the third shifted token is of the other text
    assert found.metrics["borrowed"].n == 3
    assert found.metrics["borrowed_unshifted"].value == 1
    assert len(found.predictions[0]["borrowed"]) == 2


def test_an_empty_index_lends_nothing(bundle, context, given):
    given(answer(0, [7, 8], [9, 1]), answer(1, [], []))
    found = BorrowedTokens().evaluate(bundle, context(train_tokens=TokenTable.from_sequences([])))
    assert found.metrics["borrowed"].value == found.metrics["borrowed_unshifted"].value == 0


def test_without_shifted_tokens_there_is_no_share(bundle, context, given):
    given(answer(0, [7, 8], [1, 1]))
    found = BorrowedTokens().evaluate(bundle, context(train_tokens=trained(bundle, "yes", "no")))
    assert np.isnan(found.metrics["borrowed"].value) and found.metrics["borrowed"].n == 0


def test_an_index_of_one_s_own(bundle, context, given, rows_file):
    ids = bundle.tokenizer("answers: yes no").input_ids
    given(answer(0, ids, [9] * len(ids)))
    found = BorrowedTokens(index=str(rows_file), k=24).evaluate(bundle, context())
    assert found.metrics["borrowed"].value == 1
    assert len(found.predictions[0]["nearest"]) == 24


def test_a_model_against_itself_borrows_nothing(bundle, context, monkeypatch, tiny_dir):
    """Through the whole evaluator: no token is shifted, so none can be borrowed."""
    from ftrun.config import compose

    monkeypatch.setattr(module, "_encoder", lambda _ctx: bundle)
    monkeypatch.setattr(Comparison, "_base", lambda *_: bundle)
    heldout = Rows([Record(0, "sft", (Message("user", "what is 1"), Message("assistant", "yes")))])
    ctx = context(heldout=heldout, train_tokens=trained(bundle, "yes", "no"))
    ctx.settings = compose.load([f"model.path={tiny_dir}"]).settings
    found = BorrowedTokens(context="same", max_new_tokens=6).evaluate(bundle, ctx)
    assert found.predictions[0]["shifted"] == 0 and found.metrics["borrowed"].n == 0


def test_what_cannot_be_searched_is_refused(bundle, context, text_file):
    with pytest.raises(ConfigError, match="does not know which rows"):
        BorrowedTokens().evaluate(bundle, context())
    with pytest.raises(DataError, match="no responses"):
        BorrowedTokens(index=str(text_file)).evaluate(bundle, context())
    with pytest.raises(ConfigError, match="at least 1"):
        BorrowedTokens(k=0)
