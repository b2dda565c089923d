"""Tokenising rendered segments one by one, and finding the token that ends a turn."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ftrun.data.literals import OPEN, Literals


@dataclass(frozen=True)
class Segment:
    """A stretch of rendered text; of a trained response only the tokens up to the end of turn count."""

    text: str  # control tokens that a message spells are hidden, see literals
    weight: float  # of its tokens in the loss
    response: bool = False

    @property
    def trained(self) -> bool:
        return self.weight > 0


@dataclass
class Encoder:
    tokenizer: Any

    def encode(self, conversations: list[list[Segment]]) -> list[list[list[int]]]:
        """Ids of every segment, each tokenised by itself. Raises Unspellable."""
        texts = [segment.text for segments in conversations for segment in segments]
        ids = (
            self.tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            if texts
            else []
        )
        flat = iter(ids)
        found = [[self._spelled(segment.text, list(next(flat))) for segment in segments] for segments in conversations]
        if self._marks_beginnings:
            for segments, parts in zip(conversations, found, strict=True):
                for number in range(1, len(segments)):
                    before = self.literals.show(segments[number - 1].text)[-1]
                    parts[number] = self._continued(before, segments[number].text, parts[number])
        return found

    @cached_property
    def literals(self) -> Literals:
        return Literals(self.tokenizer)

    def _spelled(self, text: str, ids: list[int]) -> list[int]:
        return self.literals.ids(text) if OPEN in text else ids

    @cached_property
    def _marks_beginnings(self) -> bool:
        """Whether a text by itself starts with a token of its own, as SentencePiece marks a word's beginning."""
        alone, after = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("b", "\nb"))
        newline = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        return after != [*newline, *alone]

    def _continued(self, before: str, text: str, alone: list[int]) -> list[int]:
        """Ids of ``text`` as they follow the character ``before``; as they stand alone where the two would merge."""
        both, first = (
            self._spelled(part, self.tokenizer(part, add_special_tokens=False)["input_ids"])
            for part in (before + text, before)
        )
        return list(both[len(first) :]) if list(both[: len(first)]) == list(first) else alone

    @cached_property
    def _special(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        marks = {
            id
            for id, token in added
            if token.content.strip() and (token.special or not any(map(str.isspace, token.content)))
        }
        return marks | set(self.tokenizer.all_special_ids)

    def turn_end(self, ids: list[int]) -> int | None:
        """Position of the token that ends the turn: the last special one, with nothing but white space after it."""
        for position in range(len(ids) - 1, -1, -1):
            if ids[position] in self._special:
                return position
            if self.tokenizer.decode([ids[position]]).strip():
                return None
        return None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what tokens can depend on: vocabulary, rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:
        rules |= {"truncation": None, "padding": None}  # switches of the last call, not properties
    parts = [
        type(tokenizer).__name__,
        rules,
        tokenizer.chat_template,
        {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
