"""Recomputing activations in the backward pass instead of keeping them."""

from __future__ import annotations

from typing import Any

from torch import nn


def checkpoint_activations(model: nn.Module) -> None:
    """Switch it on in a transformers model or one of peft around it."""
    named: Any = model
    # transformers 5 renamed the method, and warns under the old name
    enable = getattr(named, "activation_checkpointing_enable", None) or named.gradient_checkpointing_enable
    enable({"use_reentrant": False})
