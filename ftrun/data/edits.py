"""Edits that turn one text into another, as lines of text: ``start end new words``.

Positions count the words of the old text from 0; ``end`` is not included. ``start`` equal to ``end`` inserts, the word
None in place of new words deletes, and None alone says that nothing changes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

NOTHING = "None"  # instead of new words, or of edits
WORD = re.compile(r"(\s*)(\S+)|(\s+)")
LINE = re.compile(r"\s*([0-9]{1,9})[ \t]+([0-9]{1,9})(?:[ \t]+(\S.*?))?\s*")
BLANKS = {" ": r"\s", "\n": r"\n", "\t": r"\t"}  # written forms of white space that is not one blank
WRITTEN_BLANKS = re.compile(r"(?:\\[snt]|\\u[0-9a-f]{4})+")


@dataclass(frozen=True)
class Edit:
    start: int  # first word that goes
    end: int  # first word that stays
    words: tuple[str, ...]  # what comes instead, as `split` writes words


def split(text: str) -> list[str]:
    """Words of a text, each with the white space before it written out where it is not the usual one.

    Usual is one blank, and nothing before the first word; so `join` gives the text back, character by character.
    """
    words = []
    for match in WORD.finditer(text):
        before, word = match[1] or match[3] or "", match[2] or ""
        usual = " " if words else ""
        shown = "" if before == usual and word else "".join(map(_written, before))
        escaped = word.replace("\\", "\\\\")
        words.append(shown + (rf"\e{escaped}" if escaped == NOTHING and not shown else escaped))
    return words


def join(words: list[str]) -> str:
    """The text of written words. Words that nobody escaped are taken as they are."""
    text = []
    for written in words:
        shown = WRITTEN_BLANKS.match(written)
        if shown:
            text.append(re.sub(r"\\(u[0-9a-f]{4}|[snt])", _blank, shown[0]))
            written = written[shown.end() :]
        elif text:
            text.append(" ")
        text.append(written.removeprefix(r"\e").replace("\\\\", "\\"))
    return "".join(text)


def _written(blank: str) -> str:
    return BLANKS.get(blank) or f"\\u{ord(blank):04x}"


def _blank(match: re.Match[str]) -> str:
    code = match[1]
    return chr(int(code[1:], 16)) if code[0] == "u" else {"s": " ", "n": "\n", "t": "\t"}[code]


def extract(source: str, target: str) -> list[Edit]:
    """The edits that turn source into target: fewest words touched, neighbouring ones as one, in order of position."""
    old, new = split(source), split(target)
    pairs = [(-1, -1), *aligned(old, new), (len(old), len(new))]
    edits = []
    for (i, j), (next_i, next_j) in pairwise(pairs):
        if next_i - i > 1 or next_j - j > 1:
            edits.append(Edit(i + 1, next_i, tuple(new[j + 1 : next_j])))
    return edits


def aligned(old: ListLike[str], new: ListLike[str]) -> list[tuple[int, int]]:
    """Positions of the items that stay, by Levenshtein distance; a common beginning and end always stay."""
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    a, b = old[head : len(old) - tail], new[head : len(new) - tail]
    cost, kept, i, j = _distances(a, b), [], 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j] and cost[i, j] == cost[i + 1, j + 1]:
            kept.append((head + i, head + j))
            i, j = i + 1, j + 1
        elif cost[i, j] == 1 + cost[i + 1, j + 1]:
            i, j = i + 1, j + 1
        elif cost[i, j] == 1 + cost[i + 1, j]:
            i += 1
        else:
            j += 1
    return [
        *((at, at) for at in range(head)),
        *kept,
        *((len(old) - tail + at, len(new) - tail + at) for at in range(tail)),
    ]


def _distances(a: ListLike[str], b: ListLike[str]) -> np.ndarray:
    """Levenshtein distance of a[i:] and b[j:] for all i and j, (len(a) + 1, len(b) + 1)."""
    number = {item: at for at, item in enumerate({*a, *b})}
    ids = np.array([number[item] for item in b], np.int64)
    steps = np.arange(len(b) + 1, dtype=np.int32)
    cost = np.empty((len(a) + 1, len(b) + 1), np.int32)
    cost[-1] = steps[::-1]
    for i in range(len(a) - 1, -1, -1):
        row = cost[i + 1] + 1  # a[i] goes
        row[:-1] = np.minimum(row[:-1], cost[i + 1, 1:] + (ids != number[a[i]]))
        cost[i] = np.minimum.accumulate((row + steps)[::-1])[::-1] - steps  # any run of b comes
    return cost


def write(edits: list[Edit]) -> str:
    """The edits as text, one a line."""
    return "\n".join(f"{e.start} {e.end} {' '.join(e.words) or NOTHING}" for e in edits) or NOTHING


def read(text: str) -> tuple[list[Edit], int]:
    """The edits that a text holds, and how many of its lines are none."""
    edits, unread = [], 0
    for line in text.strip().split("\n"):
        match = LINE.fullmatch(line)
        if match and match[3] is not None:
            edits.append(Edit(int(match[1]), int(match[2]), () if match[3] == NOTHING else tuple(match[3].split())))
        else:
            unread += line.strip() not in (NOTHING, "")
    return edits, unread


def apply(edits: list[Edit], source: str) -> tuple[str, int]:
    """The source with these edits, and how many were refused: out of its range, or overlapping one before them."""
    words, refused, taken = split(source), 0, []
    for edit in sorted(edits, key=lambda edit: (edit.start, edit.end)):
        last = taken[-1] if taken else Edit(-1, 0, ())
        again = edit.start == edit.end == last.end and last.start == last.end  # a second insertion at one place
        if edit.start <= edit.end <= len(words) and edit.start >= last.end and not again:
            taken.append(edit)
        else:
            refused += 1
    for edit in reversed(taken):
        words[edit.start : edit.end] = edit.words
    return (join(words) if taken else source), refused
