"""What kind of text a token is, for reports on which tokens a method keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

import numpy as np

CLASSES = ("word", "number", "punctuation", "code", "space", "special")
_SENTENCE = re.compile(r"^[\s.,;:!?'\"()\-–—…’‘“”¿¡]+$")
_NUMBER = re.compile(r"^[\s$€£+\-]*\d[\d.,:/%]*\s*$")


def token_class(text: str) -> str:
    """One of CLASSES but special: symbols of formulas and programs, indentation too, are code."""
    if not text or (text.isspace() and "\t" not in text and len(text.strip("\n")) < 2):
        return "space"
    if text.isspace():
        return "code"  # indentation
    if _NUMBER.match(text):
        return "number"
    if _SENTENCE.match(text):
        return "punctuation"
    letters = [letter for letter in text.strip() if letter not in "'’-"]
    return "word" if letters and all(letter.isalpha() or letter == "�" for letter in letters) else "code"


def classes_of(tokens: np.ndarray, decode: Callable[[int], str], special: Collection[int]) -> np.ndarray:
    """Index into CLASSES of every token, (tokens,); each different one is decoded once."""
    ids, inverse = np.unique(tokens, return_inverse=True)
    kinds = ["special" if number in special else token_class(decode(number)) for number in ids.tolist()]
    return np.array([CLASSES.index(kind) for kind in kinds], np.int64)[inverse]
