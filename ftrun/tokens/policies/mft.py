"""Masked thought: fine-tuning on reasoning steps that are partly hidden."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.learned_embedding import LearnedEmbedding

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

MASKED = "masked"  # the batch remembers under this name which inputs are the mask


@register("tokens", "mft")
@dataclass
class Mft(TokenPolicy):
    """Hides some of the response from the model's eyes, and asks for all of it (Chen et al., 2024, arXiv:2403.02178).

    At every visit of a row each response token is replaced in the input with probability p, by a mask or by a token
    drawn from the vocabulary. Prompt and targets stay as they are: the loss falls on all response tokens. p rises from
    0 to ``p_max`` over the first ``warmup`` of the steps. The mask is an embedding of its own, at first the mean of all
    embeddings: the vocabulary does not change, and nothing is masked when the trained model is used.
    """

    p_max: float = 0.4  # share of the response tokens that are hidden once warmed up
    replace_rate: float = 0.0  # share of the hidden tokens that become a random token instead of the mask
    warmup: float = 0.66  # share of the optimiser steps over which p rises to p_max; 0: p_max at once
    drop_mask: bool = False  # no token sees the hidden ones, their places stay empty

    needs: ClassVar[dict[str, str]] = {"token_loss": "hides inputs of a loss that is a mean over tokens"}
    arranges: ClassVar[bool] = True
    perturbs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, share in (("p_max", self.p_max), ("replace_rate", self.replace_rate), ("warmup", self.warmup)):
            if not 0 <= share <= 1:
                raise ConfigError(f"tokens.{name} is a share from 0 to 1, not {share}", f"tokens.{name}={share}")

    def attach(self, bundle: Bundle, ctx: Context) -> nn.Module | None:
        self._vocabulary = min(len(bundle.tokenizer), bundle.architecture.vocabulary)
        self._mask = LearnedEmbedding(bundle) if self.replace_rate < 1 else None
        return self._mask

    def rate(self, progress: float) -> float:
        """p of an optimiser step, from the share of the steps that are done."""
        return self.p_max if progress >= self.warmup else self.p_max * progress / self.warmup

    def arrange(self, batch: Batch, seed: tuple[int, int], progress: float) -> Batch:
        p = self.rate(progress)
        hidden, replaced = torch.zeros(2, *batch.input_ids.shape, dtype=torch.bool)
        noise = torch.zeros(batch.input_ids.shape, dtype=torch.long)
        for row, start, end in batch.spans():
            index = int(batch.table_index[batch.sequence[row, start]])
            draw = np.random.default_rng([*seed, index])  # whatever micro-batch the row is in
            hidden[row, start:end] = torch.from_numpy(draw.random(end - start) < p)
            replaced[row, start:end] = torch.from_numpy(draw.random(end - start) < self.replace_rate)
            noise[row, start:end] = torch.from_numpy(draw.integers(self._vocabulary, size=end - start))
        hidden, replaced, noise = (part.to(batch.input_ids.device) for part in (hidden, replaced, noise))
        row, before = batch.predicting
        response = torch.zeros_like(hidden)
        response[row, before + 1] = True
        hidden &= response
        masked = hidden & ~replaced
        arranged = replace(
            batch,
            input_ids=batch.input_ids.masked_scatter(hidden, noise[hidden]).masked_fill(masked, 0),
            own_targets=batch.targets,
            remembered=batch.remembered | {MASKED: masked},
        )
        if self.drop_mask and hidden.any():
            arranged.attention = seen_without(hidden, batch)
        return arranged

    def perturb(self, embeddings: Tensor, batch: Batch, seed: tuple[int, int]) -> Tensor:
        return embeddings if self._mask is None else self._mask.put(embeddings, batch.remembered[MASKED])


def seen_without(hidden: Tensor, batch: Batch) -> Tensor:
    """Which token (row) sees which (column) when none sees the hidden ones, (rows, time, time)."""
    same = batch.sequence[:, :, None] == batch.sequence[:, None, :]
    return (same & ~hidden[:, None, :]).tril()
