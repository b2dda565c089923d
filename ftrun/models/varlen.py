"""Attention over packed documents on a CPU: one product a document instead of a masked product over all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_documents"  # as transformers knows it: sdpa in every way, faster on packed rows


def documents_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa of a packed row (1, heads, time, head width), document by document; anything else goes to sdpa as it is.

    ``cu_seq_lens_q``: (documents + 1,) where documents start, and the end. The cost falls from the square of the row's
    length to the sum of the documents' squares.
    """
    if cu_seq_lens_q is None or not _is_plain(query, attention_mask, cu_seq_lens_q):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = cu_seq_lens_q.diff().tolist()
    documents = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    parts = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in documents]
    return torch.cat(parts, dim=1), None


def document_bounds(position_ids: Tensor) -> Tensor:
    """Starts of the documents of one packed row (1, time), and its end, (documents + 1,): as transformers finds them."""
    starts = (position_ids[0].diff(prepend=position_ids[0, :1] - 1) != 1).nonzero().flatten()
    edges = starts.new_tensor([0]), starts, starts.new_tensor([position_ids.shape[1]])
    return torch.cat(edges).unique()


def _is_plain(query: Tensor, mask: Tensor | None, bounds: Tensor) -> bool:
    """Whether the mask is causal within documents and no more: no window or chunk cuts any of them."""
    if mask is None or mask.dtype != torch.bool or query.shape[0] != 1 or mask.shape[-1] != query.shape[2]:
        return False
    first, last = bounds[:-1], bounds[1:] - 1
    return bool(mask[0, 0, last, first].all())


AttentionInterface.register(NAME, documents_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
