"""Tiny random models of every supported family: two layers, width 32, a vocabulary of 96."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY, WIDTH, LAYERS, CONTEXT = 96, 32, 2, 64

ROTARY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = ROTARY | {"query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": 3.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": ROTARY | {"tie_word_embeddings": True},
    "qwen2": ROTARY,
    "qwen3": ROTARY,
    "gemma2": GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral": ROTARY | {"sliding_window": 8},
    "phi3": ROTARY | {"sliding_window": 16},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": ROTARY,
    "opt": {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 48, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "max_position_embeddings": CONTEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "olmo2": ROTARY,
    "granite": ROTARY | {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": ROTARY | {"logit_scale": 0.25},
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Each supported family in turn; a test may name its own with parametrize."""
    return request.param


@pytest.fixture
def make() -> Callable[..., PreTrainedModel]:
    """``make(family, attention="sdpa", seed=0, **config)``: a random model in eval mode."""
    return _make


def _make(family: str, attention: str = "sdpa", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in eval mode; its norms and biases are random too, so that no part hides behind a one or a zero."""
    config = AutoConfig.for_model(family, **(FAMILIES.get(family, ROTARY) | changes))
    if getattr(config, "attn_logit_softcapping", None):
        attention = "eager"  # sdpa cannot cap attention scores
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()
