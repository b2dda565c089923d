"""What kind of text a token is, for reports on which tokens a method keeps."""

from __future__ import annotations

import re
from typing import Any

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


def token_classes(tokenizer: Any, vocabulary: int) -> np.ndarray:
    """Index into CLASSES of every token id, (vocabulary,) int8; ids that the tokenizer does not know are special."""
    found = np.full(vocabulary, CLASSES.index("special"), np.int8)
    known = sorted(number for number in tokenizer.get_vocab().values() if number < vocabulary)
    special = set(tokenizer.all_special_ids)
    for number, text in zip(known, tokenizer.batch_decode([[number] for number in known]), strict=True):
        if number not in special:
            found[number] = CLASSES.index(token_class(text))
    return found
