"""An input that is no token of the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftrun.models.wrappers import unwrap

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle

ROWS_AT_ONCE = 4096


class LearnedEmbedding(nn.Module):
    """One vector (width,) that takes the place of token embeddings; at first the mean of them all."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        embedding: Any = unwrap(bundle.model).get_input_embeddings()  # type: ignore[operator]
        ids = torch.arange(bundle.architecture.vocabulary, device=embedding.weight.device)
        with torch.no_grad():  # what the module gives, not its weight: some families scale it
            sums = [embedding(part[None])[0].float().sum(dim=0) for part in ids.split(ROWS_AT_ONCE)]
        self.vector = nn.Parameter(torch.stack(sums).sum(dim=0) / len(ids))

    def put(self, embeddings: Tensor, where: Tensor) -> Tensor:
        """Embeddings (rows, time, width) with the vector at the places (rows, time) that are True."""
        return torch.where(where[..., None], self.vector.to(embeddings.dtype), embeddings)
