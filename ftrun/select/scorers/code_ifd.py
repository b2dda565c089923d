"""Instruction-following difficulty of programming tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ftrun.registry import register
from ftrun.select.scoring.difficulty import PromptedPerplexity


@register("select", "code_ifd")
@dataclass
class CodeIfd(PromptedPerplexity):
    """IFD under the model to be tuned, the best of every topic (Lv et al., 2025, arXiv:2504.12687).

    IFD = ppl(response | prompt) / ppl(response), the prompt being "Question: ... Answer:". Rows of 1 and more are left
    out; of the others, each cluster of prompts gives the same share of its highest (picker=cluster_share).
    A row with several answers gets the mean over its answers, each given all turns before it.
    """

    template: Literal["alpaca", "plain", "chat", "question"] = "question"  # layout of the prompt
    max_length: int = 2048  # tokens of prompt and response that are scored

    own_picker: ClassVar[str] = "cluster_share"
