"""Noisy embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy

if TYPE_CHECKING:
    from ftrun.data.batches import Batch


@register("tokens", "neftune")
@dataclass
class Neftune(TokenPolicy):
    """Uniform noise on the token embeddings while training, none otherwise (Jain et al., 2023, arXiv:2310.05914).

    embeddings += alpha / sqrt(L * d) * U(-1, 1), with L the tokens of the sequence, padding and packed neighbours not
    counted, and d the width. The Euclidean norm of a sequence's noise is therefore at most alpha. The noise of a
    sequence follows from the seed, the optimiser step and its place in the data: it does not depend on how a step is
    cut, packed or shared by processes.
    """

    alpha: float = 5.0  # size of the noise; 0 is plain training

    perturbs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ConfigError(f"tokens.alpha must not be negative or endless, not {self.alpha}", "tokens=neftune")

    def perturb(self, embeddings: Tensor, batch: Batch, seed: tuple[int, int]) -> Tensor:
        if self.alpha == 0:
            return embeddings
        device, width = embeddings.device, embeddings.shape[-1]
        real = batch.sequence >= 0
        lengths = torch.bincount(batch.sequence[real], minlength=batch.sequences).tolist()
        parts = []
        for index, length in zip(batch.table_index.tolist(), lengths, strict=True):
            state = np.random.SeedSequence([*seed, index]).generate_state(2).tolist()
            generator = torch.Generator(device).manual_seed(state[0] << 31 | state[1] >> 1)
            drawn = torch.rand(length, width, generator=generator, device=device) * 2 - 1
            parts.append(drawn * (self.alpha / math.sqrt(max(1, length) * width)))
        noise = torch.zeros_like(embeddings)
        noise[real] = torch.cat(parts).to(noise.dtype)  # sequences are numbered in the order in which they stand
        return embeddings + noise
