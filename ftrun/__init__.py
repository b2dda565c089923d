"""Declarative fine-tuning of language models: one recipe a published method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["run"]


def run(verb: str, recipe: str | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Do what ``ftrun VERB recipe=RECIPE OVERRIDES...`` does and return the contents of summary.json.

    Raises the errors of ftrun.errors, each with the exit code that the command line would end with.
    """
    from ftrun.config import compose
    from ftrun.config.grammar import normal_override
    from ftrun.quiet import hush
    from ftrun.verbs import run_verb

    hush()
    words = [normal_override(word) for word in overrides]
    if recipe:
        words.insert(0, f"recipe={recipe}")
    return run_verb(verb, compose.load(words, verb), words) or {}
