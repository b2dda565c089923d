"""Control tokens that somebody writes into a message: they are text there, and only the chat template writes tokens.

Before a conversation is rendered such strings are hidden behind signs that no tokenizer knows; after it the hidden
ones are tokenised as text, all others as the tokens that they are. A text without them takes no part in this.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # Unicode keeps them for a program's own use: no text holds them
HIDDEN = re.compile(f"{OPEN}([0-9]+){CLOSE}")
CONTROL = -1  # stands for a control token among ids
MARKED = re.compile(r"<\|.+\|>")  # how control tokens look where a tokenizer does not say that they are special


class Unspellable(Exception):
    """The tokenizer has no way to write a control token as text."""


@dataclass
class Literals:
    tokenizer: Any

    @cached_property
    def strings(self) -> list[str]:
        """Control tokens as they are written, longest first; the sign that hides them is hidden too."""
        added = [
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.special or MARKED.fullmatch(token.content)
        ]
        found = {text for text in (*added, *map(str, self.tokenizer.all_special_tokens)) if text.strip()}
        return [*sorted(found, key=lambda text: (-len(text), text)), OPEN]

    @cached_property
    def _written(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.strings)))

    @cached_property
    def _number(self) -> dict[str, int]:
        return {text: number for number, text in enumerate(self.strings)}

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {text: self.tokenizer.convert_tokens_to_ids(text) for text in self.strings[:-1]}

    def hide(self, value: Any) -> Any:
        """The value with the control tokens in its texts hidden; lists and objects are gone through."""
        if isinstance(value, str):
            return self._written.sub(lambda found: f"{OPEN}{self._number[found[0]]}{CLOSE}", value)
        if isinstance(value, dict):
            return {key: self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list | tuple) else value

    def show(self, text: str) -> str:
        return HIDDEN.sub(lambda found: self.strings[int(found[1])], text)

    def named(self, text: str) -> set[str]:
        """The control tokens hidden in a text."""
        return {self.strings[int(number)] for number in HIDDEN.findall(text)}

    def ids(self, text: str) -> list[int]:
        """Ids of a text in which some are hidden. Raises Unspellable."""
        plain = HIDDEN.sub("x", text)
        whole = self.tokenizer(plain, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        found = self._piecewise(text) if self._piecewise(plain) == list(whole) else None
        if found is None:  # the tokens of a piece depend on what stands around it, or a piece has control tokens
            raise Unspellable(" ".join(sorted(self.named(text))))
        return found

    def _piecewise(self, text: str) -> list[int] | None:
        """Ids of the pieces between control tokens, each tokenised by itself; None where that makes control tokens."""
        found: list[int] = []
        controls: list[int] = []
        at = 0
        for control in self._written.finditer(text):
            if control[0] == OPEN:
                continue
            found += [*self._as_text(text[at : control.start()]), CONTROL]
            controls.append(self._ids[control[0]])
            at = control.end()
        found += self._as_text(text[at:])
        if not self._reserved.isdisjoint(found):
            return None
        rest = iter(controls)
        return [next(rest) if id == CONTROL else id for id in found]

    @cached_property
    def _reserved(self) -> set[int]:
        """Ids that no text may have; the one for unknown words is not among them."""
        return set(self._ids.values()) - {self.tokenizer.unk_token_id}

    def _as_text(self, text: str) -> list[int]:
        cut: dict[str, Any] = {"truncation": False, "verbose": False, "split_special_tokens": True}
        return list(self.tokenizer(self.show(text), add_special_tokens=False, **cut)["input_ids"]) if text else []
