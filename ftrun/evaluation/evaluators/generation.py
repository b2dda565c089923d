"""Answers that the model writes, checked against the gold ones."""

from __future__ import annotations

from dataclasses import dataclass

from ftrun.evaluation.answering import Answering
from ftrun.registry import register


@register("eval", "generation")
@dataclass
class Generation(Answering):
    """Generates an answer to held-out prompts and checks it.

    ``accuracy`` is the mean score of the answers (1 right, 0 wrong), ``finished`` the share that ended by themselves
    within ``max_new_tokens``. The prompt is what training saw before the response. An answer is right by the row's
    verifier, by its last number, as the exact text, if it contains the gold words, or in part, by the F1 of its words;
    auto takes the verifier if there is one, the last number if the answer field is one, else the exact text.
    Sampling draws from a generator of each row's own, so answers depend neither on the batch nor on the number of
    processes.
    """
