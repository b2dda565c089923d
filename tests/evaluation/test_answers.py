"""Which check a row gets, and what it says."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ftrun.data.answers import check_of, last_number, word_f1
from ftrun.data.records import Message, Record
from ftrun.errors import ConfigError, DataError


def record(output: str = "", **given) -> Record:
    return Record(3, "sft", (Message("user", "what"), Message("assistant", output)), **given)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 72.", "72"),
        ("1,234,567.50 dollars", "1234567.5"),
        ("5-3=2", "2"),
        ("it is -4", "-4"),
        ("(7)-3", "3"),
        ("3, 4, 5", "5"),
        ("12,34", "34"),
        ("costs $18", "18"),
        ("none", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("row", "metric"),
    [
        (record("so 4", verifier="gsm_symbolic", answer=4), "verifier"),
        (record("so 4", answer=4), "last_number"),
        (record("so 4", answer="$1,200"), "last_number"),
        (record("so Paris", answer="Paris"), "exact_match"),
        (record("Paris 4"), "exact_match"),
    ],
)
def test_auto_takes_the_surest_check(row, metric):
    assert check_of(row, "auto", "file:3").metric == metric


def test_numbers_count_as_values():
    check = check_of(record(answer="1200"), "auto", "")
    assert check.score("first 7, then 1,200.00") == 1
    assert check.score("1200, or rather 1201") == 0
    assert check.score("no idea") == 0


def test_exact_match_overlooks_case_spaces_and_the_final_stop():
    check = check_of(record("The capital is  Paris."), "auto", "")
    assert check.score("the capital is\nparis") == 1
    assert check.score("the capital is not Paris") == 0


def test_contains_means_whole_words():
    check = check_of(record(answer="4"), "contains", "")
    assert check.score("it is 4.") == 1
    assert check.score("it is 42") == 0


def test_word_f1():
    assert word_f1("the red fox", "the red fox!") == 1
    assert word_f1("red red", "the red fox") == pytest.approx(2 / 5)
    assert word_f1("", "fox") == 0


def test_what_a_row_lacks_is_named():
    with pytest.raises(DataError, match="row 3 has no verifier"):
        check_of(record("yes"), "verifier", "file:3")
    with pytest.raises(DataError, match="row 3 has no number"):
        check_of(record("yes"), "last_number", "file:3")
    with pytest.raises(DataError, match="neither an answer nor a response"):
        check_of(record(""), "auto", "file:3")
    with pytest.raises(ConfigError):
        check_of(record("yes", verifier="absent"), "verifier", "file:3")
