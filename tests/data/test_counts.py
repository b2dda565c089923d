"""Tokens counted in pieces."""

from __future__ import annotations

import numpy as np
from transformers import AutoTokenizer

from ftrun.data import counts
from ftrun.data.ragged import Ragged
from ftrun.data.records import Message, Record

TEXTS = ["the quick brown fox", "", "a dog 7 \U0001f600 ê", "<|im_end|> yes", "no " * 40, "x"]


def test_counts_are_those_of_the_tokenizer_in_pieces_of_any_size(tiny_dir, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    expected = [len(ids) for ids in tokenizer(TEXTS, add_special_tokens=False).input_ids]
    for size in (1, 2, 4096):
        monkeypatch.setattr(counts, "TEXTS", size)
        tokenizer(TEXTS, truncation=True, max_length=2, padding="max_length")  # must leave no mark on the counts
        assert counts.count_tokens(tokenizer, iter(TEXTS)).tolist() == expected
    assert counts.count_tokens(tokenizer, []).tolist() == []
    turns = (Message("user", TEXTS[0]), Message("assistant", TEXTS[4]))
    rows = [Record(0, "sft", turns), Record(1, "text"), Record(2, "text", text=TEXTS[2])]
    assert counts.count_row_tokens(tokenizer, rows).tolist() == [expected[0] + expected[4], 0, expected[2]]


def test_ragged_reads_like_lists():
    lists = [[1, 2, 3], [], [70_000], [5] * 9]
    found = Ragged(lists)
    assert list(found) == lists and found == lists and found[-1] == lists[-1] and found[1:3] == lists[1:3]
    assert found.lengths.tolist() == [3, 0, 1, 9]
    np.testing.assert_array_equal(found.ids, np.concatenate([np.array(ids, np.int32) for ids in lists]))
