"""Instruction-following difficulty."""

from __future__ import annotations

from dataclasses import dataclass

from ftrun.registry import register
from ftrun.select.scoring.difficulty import Difficulty


@register("select", "ifd")
@dataclass
class Ifd(Difficulty):
    """How little the instruction helps with the answer (Li et al., 2024, "Cherry LLM", arXiv:2308.12032).

    IFD = mean nll of the response given the prompt / mean nll of the response after "### Response:" alone, over the
    same response tokens. Rows above 1, where the prompt hurts, are left out; the highest of the rest are taken.
    A row with several answers gets the mean over its answers, each given all turns before it.

    With ``warmup`` the scoring model is first fine-tuned on so many rows: of each cluster of prompts the same number,
    spread evenly over those whose prompt is neither very easy nor very hard to predict.
    """
