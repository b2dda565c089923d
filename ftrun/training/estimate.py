"""How much memory a training will take, before it takes it: weights, optimiser and activations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ftrun.config.settings import Settings
from ftrun.data.batches import token_budget

# values kept for the backward pass, in units of the model's width, for one token of one layer:
# inputs of the linears, norms, attention and the gated MLP, counted by hand for a Llama layer, not measured
ACTIVATIONS_PER_LAYER = 16.0
MLP_ACTIVATIONS = 12.0  # the same for the inner width of the MLP, three times the model's


def weight_bytes(settings: Settings, parameters: int, embedding: int, dtype: torch.dtype) -> float:
    """Bytes of the loaded weights; ``embedding`` weights (of ``parameters``) stay in ``dtype`` when the rest is quantised."""
    bits = settings.component("quant").bits()
    if bits is None:
        return float(parameters * dtype.itemsize)
    return (parameters - embedding) * bits / 8 + embedding * dtype.itemsize


@dataclass(frozen=True)
class Trained:
    """How many parameters train."""

    active: int  # at one time: these have gradients and optimiser state
    ever: int  # in some step: these have float32 weights
    base: int  # of ``ever``, those that are weights of the loaded model and not an adapter's


def widening_bytes(settings: Settings, trained: Trained, dtype: torch.dtype) -> float:
    """Bytes that the weights take in training beyond those of the model loaded in ``dtype``."""
    pure = settings.train.pure_bfloat16
    size = dtype.itemsize if pure else 4
    added = trained.base * (size - dtype.itemsize) + (trained.ever - trained.base) * size
    return float(added + narrowed_bytes(settings, trained.ever, dtype))


def narrowed_bytes(settings: Settings, ever: int, dtype: torch.dtype) -> float:
    """Bytes of the copies in ``dtype`` that the products of float32 weights keep until the backward pass."""
    mixed = dtype.itemsize < 4 and not settings.train.pure_bfloat16
    return float(ever * dtype.itemsize if mixed else 0)


def training_bytes(
    settings: Settings, lengths: np.ndarray, trainable: int, width: int, layers: int, device: torch.device
) -> float:
    """Bytes of gradients, optimiser state and activations. ``lengths``: tokens of every row, (rows,)."""
    train = settings.train
    gradient = 2 if train.pure_bfloat16 else 4
    optimizer = trainable * (gradient + settings.component("optim").state_bytes())
    longest = float(lengths.max(initial=1))
    batch_tokens = token_budget(train.batch_tokens, device)
    micro = min(float(batch_tokens), float(lengths.mean()) * train.batch_size * 1.5)
    micro += longest * (longest > batch_tokens)  # a row that is longer than a micro-batch comes alone
    kept = 1.0 if train.gradient_checkpointing else float(layers)
    return optimizer + micro * kept * 4 * width * (ACTIVATIONS_PER_LAYER + MLP_ACTIVATIONS)


def shortage(need: float, available: float) -> str:
    """What to tell the user when ``need`` bytes are not there; empty when they are."""
    if need <= available:
        return ""
    return (
        f"about {need / 2**30:.1f} GiB are needed, {available / 2**30:.1f} GiB are free: lower train.batch_tokens or "
        "data.max_length, use quant=nf4 with an adapter, or train.gradient_checkpointing=true"
    )
