"""Instruction-following difficulty by a small model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ftrun.registry import register
from ftrun.select.scoring.difficulty import PromptedPerplexity


@register("select", "superfiltering")
@dataclass
class Superfiltering(PromptedPerplexity):
    """IFD as a ratio of perplexities under a small model (Li et al., 2024, arXiv:2402.00530).

    IFD = ppl(response | prompt) / ppl(response), the prompt being instruction and input, each with a line break, and
    nothing else. Where the tokenizer adds no BOS, the first response token has no direct loss: it counts above the
    line only, and a one-token response has no score. Rows of 1 and more are left out; the highest are taken.
    A row with several answers gets the mean over its answers, each given all turns before it.
    """

    ratio: Literal["loss", "ppl"] = "ppl"  # ratio of mean losses, or of their exponentials
    template: Literal["alpaca", "plain", "chat"] = "plain"  # layout of the prompt; plain: lines without any markup
    max_length: int = 1024  # tokens of prompt and response that are scored
