"""A loaded model with everything that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftrun.models.architecture import Architecture


@dataclass
class Bundle:
    model: nn.Module  # a transformers model, or the peft model around it
    tokenizer: Any
    architecture: Architecture  # where the layers, linears, norms, embeddings and head of the base model are
    device: torch.device
    dtype: torch.dtype
    path: str  # as the user named it
    fingerprint: str  # hash of the base weights and the tokenizer
    context_length: int  # tokens that the model can attend to

    @property
    def computes(self) -> dict[str, str]:
        """What it computes with: for keys of what is kept (quantisation apart, which is the config's to name)."""
        config: Any = self.model.config
        attention = config.get_text_config(decoder=True)._attn_implementation
        dtype, device = str(self.dtype), self.device.type
        return {"fingerprint": self.fingerprint, "dtype": dtype, "attention": attention, "device": device}

    @property
    def pad_id(self) -> int:
        """Id that fills the right of a batch; never seen by attention or loss."""
        return self.tokenizer.pad_token_id or 0
