"""Batched generation: what a model writes after a prompt, whatever else is in its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ftrun.data.render import Renderer

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle


@dataclass
class Writer:
    """Writes answers, greedily or by sampling.

    Sampling draws from a generator of each row's own, so answers depend neither on the batch nor on the number of
    processes.
    """

    max_new_tokens: int = 128  # longest answer, in tokens
    temperature: float = 0.0  # 0 takes the most likely token, 1 samples from the model's own distribution

    def generate(
        self,
        bundle: Bundle,
        prompts: list[list[int]],
        stops: list[int],
        seed: int,
        processors: Sequence[LogitsProcessor] = (),
        until: StoppingCriteria | None = None,
    ) -> list[list[int]]:
        """New tokens of every prompt, up to and with the first stop token.

        ``processors`` change the logits before anything is drawn; a row also ends where ``until`` says so.
        """
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), bundle.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padding on the left: every answer begins at the same position
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        # what is not said here would come from the model's own generation_config.json
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=stops or None,
            pad_token_id=bundle.pad_id,
            use_cache=True,
        )
        changes = [*processors, *([OwnNoise(prompts, self.temperature, seed)] if self.temperature > 0 else [])]
        model: Any = bundle.model
        whole = model.generate(
            input_ids=ids.to(bundle.device),
            attention_mask=mask.to(bundle.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(changes),
            stopping_criteria=StoppingCriteriaList([until] if until else []),
        )
        return [_until_stop(row, stops) for row in whole[:, longest:].tolist()]


class OwnNoise(LogitsProcessor):
    """Sampling as a search for the highest logit: with Gumbel noise on all, it is a draw from the softmax."""

    def __init__(self, prompts: list[list[int]], temperature: float, seed: int):
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(_seed_of(prompt, seed)) for prompt in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        waits = [torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in self.generators]
        return scores / self.temperature - torch.stack(waits).log().to(scores.device)


def _seed_of(prompt: list[int], seed: int) -> int:
    content = hashlib.blake2b(repr((seed, prompt)).encode(), digest_size=7).digest()
    return int.from_bytes(content, "big")


def stop_ids(bundle: Bundle, renderer: Renderer) -> list[int]:
    """The template's end of turn and every token that tokenizer or model call an end of text."""
    named = getattr(getattr(bundle.model, "generation_config", None), "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return sorted({renderer.end_of_turn, *(end for end in [*ends, bundle.tokenizer.eos_token_id] if end is not None)})


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    """Without the padding that follows the first stop token."""
    end = next((at for at, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]
