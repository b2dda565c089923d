"""Lengths that a prompt asks for, and how well an answer keeps to one."""

from __future__ import annotations

import re

from ftrun.errors import ConfigError

CJK = "\u3400-\u4dbf\u4e00-\u9fff"
CHARACTER = re.compile(rf"[{CJK}]")
WORD = re.compile(rf"[^\W_{CJK}]+(?:['\u2019-][^\W_{CJK}]+)*")
DIGIT = {"\u96f6": 0, "\u4e00": 1, "\u4e8c": 2, "\u4e24": 2, "\u4e09": 3, "\u56db": 4, "\u4e94": 5}
DIGIT |= {"\u516d": 6, "\u4e03": 7, "\u516b": 8, "\u4e5d": 9}
TEN = "\u5341"
UNIT = {"\u767e": 100, "\u5343": 1000, "\u4e07": 10_000}  # hundred, thousand, ten thousand
NUMBER = r"(\d{1,3}(?:,\d{3})+|\d+)"
IN_DIGITS = re.compile(rf"{NUMBER}\s*\u5b57|{NUMBER} words")  # 800 characters in Chinese, 800 words in English
IN_NUMERALS = re.compile(rf"([{''.join(DIGIT)}{TEN}]+)([{''.join(UNIT)}])\u5b57")


def demanded_lengths(prompt: str, patterns: list[str]) -> set[int]:
    """The different lengths that a prompt states, in Chinese characters or words of other languages.

    ``patterns`` are further regular expressions whose first group is a number.
    """
    found = {_value(match[1] or match[2]) for match in IN_DIGITS.finditer(prompt)}
    found |= {_numeral(match[1]) * UNIT[match[2]] for match in IN_NUMERALS.finditer(prompt)}
    found |= {_value(match[1]) for pattern in patterns for match in re.finditer(pattern, prompt)}
    return {length for length in found if length > 0}


def check_patterns(patterns: list[str], knob: str) -> None:
    """Raises ConfigError for what is no regular expression, or has no group around the number."""
    for pattern in patterns:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ConfigError(f"this is no regular expression: {error}", f"{knob}={pattern}") from None
        if groups < 1:
            raise ConfigError(
                "a pattern needs a group around the number", f"{knob}={pattern}", r"Such as: in (\d+) lines"
            )


def text_length(text: str) -> int:
    """Chinese characters, and words of other scripts."""
    return len(CHARACTER.findall(text)) + len(WORD.findall(text))


def length_score(length: int, required: int) -> float:
    """S_L of LongBench-Write: 100 at the required length, falling to 0 at four times and at a third of it."""
    if length <= 0:
        return 0.0
    if length > required:
        return 100 * max(0.0, 1 - (length / required - 1) / 3)
    return 100 * max(0.0, 1 - (required / length - 1) / 2)


def _value(digits: str) -> int:
    return int(digits.replace(",", ""))


def _numeral(text: str) -> int:
    """A Chinese numeral below 100: two, ten, fifteen, thirty."""
    before, ten, after = text.partition(TEN)
    if not ten:
        return DIGIT.get(text[-1], 0)
    return 10 * (DIGIT.get(before[-1:], 0) if before else 1) + (DIGIT.get(after[:1], 0) if after else 0)
