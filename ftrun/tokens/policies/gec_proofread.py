"""Proofreading: texts with typing errors to correct, made from clean ones."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ftrun.data.records import Message, Record
from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy, edited_row
from ftrun.tokens.edited import SOURCE

if TYPE_CHECKING:
    from ftrun.training.context import Context

# where the keys of a QWERTY keyboard lie, in key widths
KEYS = {
    letter: (column + shift, row)
    for row, (letters, shift) in enumerate((("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75)))
    for column, letter in enumerate(letters)
}
LETTERS = "".join(sorted(KEYS))


@register("tokens", "gec_proofread")
@dataclass
class GecProofread(TokenPolicy):
    """Trains to undo typing errors that are put into clean texts (Liu et al., 2024, arXiv:2406.04523).

    Clean texts are rows of texts, or the last responses of conversations. Each letter is struck with probability
    ``rate`` by one error, drawn evenly from the kinds that are possible there: the letter is dropped, one is inserted after it, it
    changes places with the next, it is typed twice, one of a double letter is missing, or a key nearby is hit, by a
    Gaussian of ``spread`` key widths around the right one. The model gets the instruction and the faulty text, and
    learns to write the clean one. A ``clean_share`` of the texts stays as it is, so that it learns to leave right
    texts alone. Errors follow from the text and the seed.
    """

    rate: float = 0.03  # share of the letters that are struck
    clean_share: float = 0.1  # share of the texts that get no error
    kinds: list[Literal["drop", "insert", "transpose", "double", "undouble", "neighbour", "space", "case"]] = field(
        default_factory=lambda: ["drop", "insert", "transpose", "double", "undouble", "neighbour"]
    )  # errors that occur; space (a blank is missing) and case (small for capital and back) are not the paper's
    spread: float = 0.7  # standard deviation of where a finger lands, in key widths
    instruction: str = "Proofread this text. Answer with the corrected text only."  # stands above the text

    edits: ClassVar[bool] = True
    edits_heldout: ClassVar[bool] = True
    eats: ClassVar[tuple[str, ...]] = ("sft", "text")

    def __post_init__(self) -> None:
        for name, share in (("rate", self.rate), ("clean_share", self.clean_share)):
            if not 0 <= share <= 1:
                raise ConfigError(f"tokens.{name} is a share from 0 to 1, not {share}", f"tokens.{name}={share}")
        if not 0 < self.spread < float("inf"):
            raise ConfigError(f"tokens.spread must be above 0, not {self.spread}", f"tokens.spread={self.spread}")
        if not self.kinds:
            raise ConfigError("tokens.kinds names no error", "tokens.kinds=[]", "Use tokens.rate=0 for none.")

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        """The clean text as response to the instruction and the text with errors, which stands in ``source`` too."""
        counted: Counter[str] = Counter()
        for record in records:
            text = (record.text if record.kind == "text" else record.response).strip()
            draw = np.random.default_rng([ctx.seed, *np.frombuffer(hashlib.blake2b(text.encode()).digest(), np.uint32)])
            left_clean = draw.random() < self.clean_share
            source, errors = (text, 0) if left_clean else self.corrupt(text, draw)
            if not source.strip():  # a text of few letters may lose them all
                source, errors = text, 0
            counted += Counter({"pairs": 1, "left clean": left_clean, "no error": not left_clean and source == text})
            counted += Counter({"letters": sum(letter.isalpha() for letter in text), "errors": errors})
            row = edited_row(record, [self._asked(source), Message("assistant", text)])
            yield {key: value for key, value in row.items() if key != "text"} | {SOURCE: source}
        ctx.report.note(
            f"{counted['errors']} errors in {counted['letters']} letters of {counted['pairs']} texts; "
            f"{counted['left clean']} were left clean, and {counted['no error']} more are as they were"
        )

    def edit_prompt(self, record: Record) -> Record:
        asked = self._asked(record.messages[-1].content)
        return replace(record, messages=(*record.messages[:-1], asked))

    def _asked(self, text: str) -> Message:
        return Message("user", f"{self.instruction}\n\n{text}" if self.instruction else text)

    # ---- errors ----

    def corrupt(self, text: str, draw: np.random.Generator) -> tuple[str, int]:
        """The text with errors, and how many there are."""
        written, errors, at = [], 0, 0
        while at < len(text):
            kinds = self._possible(text, at) if draw.random() < self.rate else []
            if not kinds:
                written.append(text[at])
                at += 1
                continue
            kind = kinds[int(draw.integers(len(kinds)))]
            made, used = self._struck(kind, text, at, draw)
            written.append(made)
            errors, at = errors + 1, at + used
        return "".join(written), errors

    def _possible(self, text: str, at: int) -> list[str]:
        """Kinds of errors that change the text at this place."""
        here, following = text[at], text[at + 1 : at + 2]
        if not here.isalpha():
            return ["space"] if here == " " and "space" in self.kinds else []
        able = {
            "drop": True,
            "insert": True,
            "transpose": following.isalpha() and following != here,
            "double": True,
            "undouble": following == here,
            "neighbour": here.lower() in KEYS,
            "space": False,
            "case": here.swapcase() != here,
        }
        return [kind for kind in self.kinds if able[kind]]

    def _struck(self, kind: str, text: str, at: int, draw: np.random.Generator) -> tuple[str, int]:
        """What is typed instead, and for how many characters of the text it stands."""
        here = text[at]
        if kind == "transpose":
            return text[at + 1] + here, 2
        if kind == "undouble":
            return here, 2
        typed = {
            "drop": "",
            "space": "",
            "double": here + here,
            "case": here.swapcase(),
            "insert": here + _like(here, LETTERS[int(draw.integers(len(LETTERS)))]),
            "neighbour": self._neighbour(here, draw) if kind == "neighbour" else "",
        }
        return typed[kind], 1

    def _neighbour(self, letter: str, draw: np.random.Generator) -> str:
        """Another key, by a Gaussian of its distance."""
        x, y = KEYS[letter.lower()]
        others = [other for other in LETTERS if other != letter.lower()]
        distances = np.array([(KEYS[other][0] - x) ** 2 + (KEYS[other][1] - y) ** 2 for other in others])
        logits = -distances / (2 * self.spread**2)
        chances = np.exp(logits - logits.max())
        return _like(letter, others[int(draw.choice(len(others), p=chances / chances.sum()))])


def _like(model: str, letter: str) -> str:
    return letter.upper() if model.isupper() else letter
