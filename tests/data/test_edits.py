"""Edits between two texts, written and read back."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from ftrun.data.edits import Edit, apply, extract, join, read, split, write

PIECES = [
    "a",
    "b",
    "c",
    "None",
    "\\",
    "\\n",
    "\\s",
    "\\e",
    "\\eNone",
    "7",
    "0 1",
    "é",
    "\u3000x",
    "\n",
    "  ",
    "\t",
    " ",
]
PAIRS = [
    ("the cat sat on the mat", "the black cat sat on mat"),
    ("same text", "same text"),
    ("", "new"),
    ("all of it goes", ""),
    ("one\n\ntwo  three", "one\n\ntwo three"),
    ("None of it", "of None"),
    (" leading and trailing ", "leading and trailing"),
]


def random_text(draw: random.Random) -> str:
    return "".join(draw.choice(PIECES) + draw.choice(["", " "]) for _ in range(draw.randint(0, 7)))


def test_applying_what_was_extracted_gives_the_target():
    draw = random.Random(0)
    pairs = PAIRS + [(random_text(draw), random_text(draw)) for _ in range(2000)]
    for source, target in pairs:
        found = extract(source, target)
        assert read(write(found)) == (found, 0), (source, target)
        assert apply(found, source) == (target, 0), (source, target)
        for one, after in pairwise(found):
            assert one.end < after.start, (source, target)


def test_words_keep_their_white_space():
    for text in ("a b", " a", "a\tb\n", "\u3000a  b", "\\n \\\\ None", ""):
        assert join(split(text)) == text


def test_the_form_of_the_edits():
    assert write(extract("he go to school", "he goes to the school")) == "1 2 goes\n3 3 the"
    assert write(extract("a b c", "a c")) == "1 2 None"
    assert write(extract("a b", "a b")) == "None"
    assert extract("a b", "x a b") == [Edit(0, 0, ("x",))]


@pytest.mark.parametrize("count", [0, 1, 5, 9])
def test_as_few_words_as_possible_are_touched(count):
    draw = random.Random(count)
    for _ in range(50):
        a, b = ([draw.choice("xyz") for _ in range(draw.randint(0, count))] for _ in range(2))
        cost = sum(max(e.end - e.start, len(e.words)) for e in extract(" ".join(a), " ".join(b)))
        assert cost == levenshtein(a, b)


def levenshtein(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def test_what_is_no_edit_is_counted_and_passed_over():
    assert read("hello\n1 2 x\n3\n-1 2 y\n\n9999999999 1 z\n1 2") == ([Edit(1, 2, ("x",))], 5)
    assert read("") == ([], 0) == read("None")
    assert read("1 1 \\") == ([Edit(1, 1, ("\\",))], 0)


@pytest.mark.parametrize(
    ("edits", "text", "refused"),
    [
        ([Edit(5, 6, ("x",))], "a b c", 1),
        ([Edit(2, 1, ("x",))], "a b c", 1),
        ([Edit(0, 2, ("x",)), Edit(1, 3, ("y",))], "x c", 1),
        ([Edit(1, 1, ("x",)), Edit(1, 1, ("y",))], "a x b c", 1),
        ([Edit(2, 3, ()), Edit(0, 1, ())], "b", 0),
        ([Edit(1, 1, ("x",)), Edit(1, 2, ("y",))], "a x y c", 0),
        ([Edit(3, 3, ("x",))], "a b c x", 0),
    ],
)
def test_edits_that_cannot_be_are_refused(edits, text, refused):
    assert apply(edits, "a b c") == (text, refused)


def test_nothing_that_a_model_writes_fails():
    draw = random.Random(1)
    for _ in range(500):
        noise = "".join(draw.choice("0123456789 \n\\-Nonea\u0663²\x00") for _ in range(30))
        text, _ = apply(read(noise)[0], "some source text")
        assert isinstance(text, str)
    assert apply([], " odd  spaces ") == (" odd  spaces ", 0)
