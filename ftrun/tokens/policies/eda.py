"""Easy data augmentation of prompts and labelled texts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy, edited_row
from ftrun.tokens.edited import with_prompt

if TYPE_CHECKING:
    from ftrun.data.records import Record
    from ftrun.training.context import Context

WORD = re.compile(r"(\s*)(\S+)")
LETTERS = re.compile(r"[^\W\d_]+")
Words = list[tuple[str, str]]  # a word, and the white space before it
NEIGHBOURS = 5  # nearest words of which a synonym is drawn
SHORTEST = 3  # letters of a word that may be replaced or inserted
OPERATIONS = ("synonym", "insertion", "swap", "deletion")


@register("tokens", "eda")
@dataclass
class Eda(TokenPolicy):
    """Adds changed copies of every row (Wei & Zou, 2019, arXiv:1901.11196; for adapters: Obadinma et al., 2023, arXiv:2303.02577).

    Each copy undergoes one operation on n = max(1, alpha * words) words: replaced by a synonym, a synonym of another
    word put in, swapped in pairs, or deleted, each word with probability alpha. Only the last prompt of a conversation
    changes, or the text of a labelled row: never an answer, a label or a held-out row. A synonym is one of the five
    nearest words in the model's own table of embeddings; often it is another form of the same word.
    """

    alpha: float = 0.1  # share of the words that an operation touches; 0 leaves the rows as they are
    n_aug: int = 4  # changed copies of each row; 0 leaves the rows as they are
    operations: list[str] = field(default_factory=lambda: ["synonym", "insertion", "swap", "deletion"])  # to draw from
    keep_digits: bool = True  # words with a digit stay: what they say may decide the answer

    edits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError("tokens.alpha is a share of the words, from 0 to 1", f"tokens.alpha={self.alpha:g}")
        if self.n_aug < 0:
            raise ConfigError("tokens.n_aug is a number of copies, 0 or more", f"tokens.n_aug={self.n_aug}")
        unknown = [name for name in self.operations if name not in OPERATIONS]
        if unknown or not self.operations:
            todo = f"Known: {', '.join(OPERATIONS)}."
            raise ConfigError(
                "tokens.operations names what copies undergo", f"tokens.operations={self.operations}", todo
            )

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        copies = self.n_aug if self.alpha > 0 else 0
        synonyms = Synonyms.of_model(ctx) if copies and {"synonym", "insertion"} & {*self.operations} else None
        unchanged = 0
        for record in records:
            yield _row(record)
            text = prompt_of(record, ctx)
            for copy in range(copies):
                random = np.random.default_rng(_seed_of(text, ctx.seed, copy))
                operation = self.operations[int(random.integers(len(self.operations)))]
                changed = self.augmented(text, operation, random, synonyms)
                if changed == text:
                    unchanged += 1
                    continue
                yield _row(with_prompt(record, changed)) | {"augmentation": operation}
        if unchanged:
            ctx.report.note(f"{unchanged} copies came out as they went in, and are left out")

    def augmented(self, text: str, operation: str, random: np.random.Generator, synonyms: Synonyms | None) -> str:
        """The text after one operation; the same text where none of its words can be touched."""
        words: Words = [(match[1], match[2]) for match in WORD.finditer(text)]
        free = [at for at, (_, word) in enumerate(words) if not (self.keep_digits and re.search(r"\d", word))]
        count = max(1, int(self.alpha * len(words)))
        if operation == "deletion":
            words = _deleted(words, free, self.alpha, random)
        elif operation == "swap":
            words = _swapped(words, free, count, random)
        else:
            assert synonyms is not None
            change = _replaced if operation == "synonym" else _inserted
            words = change(words, free, count, random, synonyms)
        return "".join(gap + word for gap, word in words) + text[len(text.rstrip()) :]


def _deleted(words: Words, free: list[int], alpha: float, random: np.random.Generator) -> Words:
    """Each free word goes with probability alpha; one of them stays where all words would go."""
    gone = {at for at in free if random.random() < alpha}
    if words and len(gone) == len(words):
        gone.discard(int(random.integers(len(words))))
    left = [word for at, word in enumerate(words) if at not in gone]
    return [(words[0][0], left[0][1]), *left[1:]] if left else left  # the text begins as it did


def _swapped(words: Words, free: list[int], count: int, random: np.random.Generator) -> Words:
    """Two free words change places, ``count`` times; the white space stays."""
    words = list(words)
    if len(free) < 2:
        return words
    for _ in range(count):
        one, other = (free[int(at)] for at in random.choice(len(free), 2, replace=False))
        (a, first), (b, second) = words[one], words[other]
        words[one], words[other] = (a, second), (b, first)
    return words


def _replaced(words: Words, free: list[int], count: int, random: np.random.Generator, synonyms: Synonyms) -> Words:
    """Up to ``count`` different words that have a synonym get one, wherever they stand."""
    words = list(words)
    cores = [(at, match) for at in free if (match := LETTERS.search(words[at][1]))]
    known = [core for core in dict.fromkeys(match[0] for _, match in cores) if synonyms.near(core)]
    for place in random.permutation(len(known))[:count]:
        near = synonyms.near(known[place])
        synonym = near[int(random.integers(len(near)))]
        for at, match in cores:
            if match[0] == known[place]:
                gap, word = words[at]
                words[at] = (gap, word[: match.start()] + synonym + word[match.end() :])
    return words


def _inserted(words: Words, free: list[int], count: int, random: np.random.Generator, synonyms: Synonyms) -> Words:
    """``count`` times a synonym of one of the text's words, anywhere after the first word."""
    cores = [match[0] for at in free if (match := LETTERS.search(words[at][1]))]
    known = [core for core in dict.fromkeys(cores) if synonyms.near(core)]
    words = list(words)
    for _ in range(count if known else 0):
        near = synonyms.near(known[int(random.integers(len(known)))])
        words.insert(int(random.integers(1, len(words) + 1)), (" ", near[int(random.integers(len(near)))]))
    return words


class Synonyms:
    """Nearest whole words by the cosine of their embeddings."""

    def __init__(self, words: list[str], vectors: np.ndarray):
        self.place = {word: at for at, word in enumerate(words)}
        self.words = words
        vectors = vectors - vectors.mean(axis=0)  # what all words share says nothing of their meaning
        self.vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        self._near: dict[str, list[str]] = {}

    @classmethod
    def of_model(cls, ctx: Context) -> Synonyms:
        """From the embedding table of the run's model: tokens that are a whole word of three letters or more."""
        from ftrun.models.load import load_bundle
        from ftrun.models.wrappers import unwrap

        bundle = load_bundle(ctx.settings.model, task=ctx.settings.task)
        model: Any = unwrap(bundle.model)
        table: np.ndarray = model.get_input_embeddings().weight.detach().float().numpy()
        ids = range(min(len(table), len(bundle.tokenizer)))
        texts = [text.strip() for text in bundle.tokenizer.batch_decode([[id] for id in ids])]
        asked = [at for at, text in enumerate(texts) if len(text) >= SHORTEST and LETTERS.fullmatch(text)]
        spelt = [f" {texts[at]}" for at in asked]
        encoded = bundle.tokenizer(spelt, add_special_tokens=False).input_ids if spelt else []
        whole = [at for at, ids in zip(asked, encoded, strict=True) if ids == [at]]
        return cls([texts[at] for at in whole], table[whole])

    def near(self, word: str) -> list[str]:
        """The five nearest other words, nearest first; none where the word is unknown."""
        if word not in self._near:
            at = self.place.get(word)
            order = [] if at is None else np.argsort(-(self.vectors @ self.vectors[at]), kind="stable")[:50].tolist()
            others = [self.words[place] for place in order if self.words[place].lower() != word.lower()]
            self._near[word] = others[:NEIGHBOURS]
        return self._near[word]


def prompt_of(record: Record, ctx: Context) -> str:
    """The part of a row that may change. Raises ConfigError for rows that have none."""
    if record.kind == "labels":
        return record.text
    asked = [message.content for message in record.prompt if message.role == "user"]
    if record.kind != "sft" or not asked:
        raise ConfigError(
            f"tokens=eda changes prompts and labelled texts; row {record.id} has neither",
            f"data.path={ctx.settings.data.path}",
            "Use rows with a prompt and a response, or with text and label.",
        )
    return asked[-1]


def _row(record: Record) -> dict[str, Any]:
    if record.kind != "labels":
        return edited_row(record, list(record.messages))
    pair = {} if record.text_pair is None else {"text_pair": record.text_pair}
    return {"text": record.text, **pair, "label": record.label, "row": record.id}


def _seed_of(text: str, seed: int, copy: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr((seed, copy, text)).encode(), digest_size=8).digest(), "big")
