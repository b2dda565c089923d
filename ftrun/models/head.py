"""The language-model head: logits from hidden states, and token losses without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 64 * 2**20  # upper bound of the logits that exist at one time
CACHED_ROWS, CACHED_WORDS = 512, 1024  # logits of so many positions by so many words stay in a CPU's cache


@dataclass(frozen=True)
class Head:
    """``logits = cap * tanh(scale * (hidden W' + bias) / cap)``; without a cap, ``scale * (hidden W' + bias)``.

    A head that is not a plain linear layer (LoRA on it, quantised, an unknown formula) is ``forward`` instead:
    a function from hidden states (n, width) to logits (n, vocabulary).
    """

    weight: Tensor | None  # (vocabulary, width)
    bias: Tensor | None = None  # (vocabulary,)
    scale: float = 1.0  # Cohere, Granite
    cap: float | None = None  # Gemma
    vocabulary: int = 0
    forward: Callable[[Tensor], Tensor] | None = None
    products: torch.dtype | None = None  # of the products with the weight; None: the weight's own

    def inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and the weight as their product wants them: in the dtype of autocast where it is on."""
        assert self.weight is not None
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.products
        dtype = dtype or self.weight.dtype
        return hidden.to(dtype), self.weight.to(dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states (..., width) -> (..., vocabulary)."""
        if self.forward is not None:
            flat = self.forward(hidden.reshape(-1, hidden.shape[-1]))
            return flat.reshape(*hidden.shape[:-1], flat.shape[-1])
        hidden, weight = self.inputs(hidden)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return _bend(F.linear(hidden, weight, bias), self.scale, self.cap)


def token_nll(hidden: Tensor, head: Head, target_ids: Tensor) -> Tensor:
    """Negative log-likelihood of each target, (n,) float32, from hidden states (n, width) and target ids (n,).

    At most ``LOGITS_BYTES`` of logits exist at a time, forward or backward.
    """
    if head.forward is not None:
        return _module_nll(hidden, head, target_ids)
    bias, device = head.bias, hidden.device.type
    hidden, weight = head.inputs(hidden)
    with torch.autocast(device, enabled=False):
        trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trains_head and torch.is_grad_enabled():
            return _TrainedHeadNll.apply(hidden, weight, bias, target_ids, head.scale, head.cap)
        wants_gradient = hidden.requires_grad and torch.is_grad_enabled()
        if not wants_gradient and device == "cpu" and weight.dtype == torch.float32:
            return _nll_in_cache(hidden, weight, bias, target_ids, head.scale, head.cap)
        return _FrozenHeadNll.apply(hidden, weight, bias, target_ids, head.scale, head.cap, wants_gradient)


@torch.no_grad()
def token_entropy(hidden: Tensor, head: Head) -> Tensor:
    """Entropy in nats of what each of the hidden states (n, width) predicts, (n,), in at least float32; no gradient.

    At most ``LOGITS_BYTES`` of logits exist at a time.
    """
    if head.weight is not None:
        hidden, weight = head.inputs(hidden)
        head = replace(head, weight=weight)  # narrowed once, not in every chunk
    entropy = hidden.new_empty(len(hidden), dtype=accurate_dtype(hidden.dtype))
    for rows in row_chunks(len(hidden), head.vocabulary, entropy.element_size(), buffers=3):
        logits = head.logits(hidden[rows]).to(entropy.dtype)
        entropy[rows] = torch.special.entr(logits.softmax(1)).sum(1)  # 0 where a probability is 0
    return entropy


@torch.no_grad()
def _nll_in_cache(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, cap: float | None
) -> Tensor:
    """Token losses with a running logsumexp over blocks of the vocabulary; no block of logits ever leaves the cache."""
    nll = hidden.new_empty(len(hidden))
    for start in range(0, len(hidden), CACHED_ROWS):
        states, ids = hidden[start : start + CACHED_ROWS], targets[start : start + CACHED_ROWS]
        highest, total = states.new_full((len(states),), -torch.inf), states.new_zeros(len(states))
        for first in range(0, len(weight), CACHED_WORDS):
            words = slice(first, first + CACHED_WORDS)
            logits = _bend_(torch.mm(states, weight[words].T), None if bias is None else bias[words], scale, cap)
            rising = torch.maximum(highest, logits.amax(1))
            total.mul_((highest - rising).exp_()).add_(logits.sub_(rising.unsqueeze(1)).exp_().sum(1))
            highest = rising
        gold = torch.linalg.vecdot(states, weight[ids]).unsqueeze(1)
        gold = _bend_(gold, None if bias is None else bias[ids].unsqueeze(1), scale, cap).squeeze(1)
        nll[start : start + CACHED_ROWS] = total.log_().add_(highest).sub_(gold)
    return nll


class _FrozenHeadNll(torch.autograd.Function):
    """The gradient of a token's loss is linear in its upstream factor, so the forward can finish it up to that factor."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        cap: float | None,
        wants_gradient: bool,
    ) -> Tensor:
        nll = hidden.new_empty(len(hidden), dtype=accurate_dtype(hidden.dtype))
        unscaled = torch.empty_like(hidden) if wants_gradient else None
        chunks = row_chunks(len(hidden), len(weight), nll.element_size(), buffers=1 if cap is None else 2)
        space = logits_space(hidden, weight, chunks)
        for rows in chunks:
            logits = chunk_logits(hidden[rows], weight, bias, scale, cap, space)
            probabilities, slope, nll[rows] = _softmax_(logits, targets[rows], cap, wants_slope=wants_gradient)
            if unscaled is not None:
                raw = _raw_gradient_(probabilities, targets[rows], slope)
                unscaled[rows] = (raw.to(weight.dtype) @ weight) * scale
        ctx.save_for_backward(unscaled)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (unscaled,) = ctx.saved_tensors
        return (unscaled * upstream.unsqueeze(1).to(unscaled.dtype), None, None, None, None, None, None)


class _TrainedHeadNll(torch.autograd.Function):
    """With a head that trains, the gradient of its weight mixes the tokens: logits are computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, cap: float | None
    ) -> Tensor:
        nll = hidden.new_empty(len(hidden), dtype=accurate_dtype(hidden.dtype))
        chunks = row_chunks(len(hidden), len(weight), nll.element_size(), buffers=1)
        space = logits_space(hidden, weight, chunks)
        for rows in chunks:
            logits = chunk_logits(hidden[rows], weight, bias, scale, cap, space)
            _, _, nll[rows] = _softmax_(logits, targets[rows], cap, wants_slope=False)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.scale, ctx.cap = scale, cap
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        accurate = accurate_dtype(hidden.dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=accurate) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=accurate) if needs_bias else None
        chunks = row_chunks(len(hidden), len(weight), upstream.element_size(), buffers=1 if ctx.cap is None else 2)
        space = logits_space(hidden, weight, chunks)
        for rows in chunks:
            logits = chunk_logits(hidden[rows], weight, bias, ctx.scale, ctx.cap, space)
            probabilities, slope, _ = _softmax_(logits, targets[rows], ctx.cap, wants_slope=True)
            raw = _raw_gradient_(probabilities, targets[rows], slope).mul_((upstream[rows] * ctx.scale).unsqueeze(1))
            add_gradients_(raw, rows, hidden, weight, d_hidden, d_weight, d_bias)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return (d_hidden, d_weight, d_bias, None, None, None)


def _module_nll(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Through the model's own head: autograd inside each chunk, which is computed again in the backward."""

    def nll(states: Tensor, ids: Tensor) -> Tensor:
        logits = head.logits(states)
        return F.cross_entropy(logits.to(accurate_dtype(logits.dtype)), ids, reduction="none")

    size = accurate_dtype(hidden.dtype).itemsize
    parts = [
        checkpoint(nll, hidden[rows], targets[rows], use_reentrant=False)
        if torch.is_grad_enabled()
        else nll(hidden[rows], targets[rows])
        for rows in row_chunks(len(hidden), head.vocabulary, size, buffers=3)
    ]
    return torch.cat(parts) if parts else hidden.sum(-1).to(accurate_dtype(hidden.dtype))


def add_gradients_(
    raw: Tensor,
    rows: slice,
    hidden: Tensor,
    weight: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Spread the gradient ``raw`` (chunk, vocabulary) by what `_bend_` was given onto those that are wanted, in place."""
    if d_bias is not None:
        d_bias += raw.sum(0)
    raw = raw.to(weight.dtype)
    if d_hidden is not None:
        d_hidden[rows] = raw @ weight
    if d_weight is not None:
        if d_weight.dtype == weight.dtype:
            d_weight.addmm_(raw.T, hidden[rows])
        else:
            d_weight += raw.T @ hidden[rows]


def row_chunks(count: int, vocabulary: int, element_size: int, buffers: int) -> list[slice]:
    """Ranges of positions whose logits, ``buffers`` times over, stay within ``LOGITS_BYTES``."""
    rows = max(1, LOGITS_BYTES // (max(1, vocabulary) * element_size * buffers))
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def chunk_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None, space: Tensor | None
) -> Tensor:
    """Logits of a chunk, in at least float32; they overwrite ``space`` where there is one."""
    raw = hidden @ weight.T if space is None else torch.mm(hidden, weight.T, out=space[: len(hidden)])
    return _bend_(raw.to(accurate_dtype(raw.dtype)), bias, scale, cap)


def _softmax_(
    logits: Tensor, targets: Tensor, cap: float | None, wants_slope: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Softmax in place of the logits, the slope of the cap at every logit, and the targets' nll."""
    slope = slope_of_cap(logits, cap) if wants_slope else None
    gold = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    highest = logits.amax(1)
    logits.sub_(highest.unsqueeze(1)).exp_()
    total = logits.sum(1)
    nll = total.log() + highest - gold
    return logits.div_(total.unsqueeze(1)), slope, nll


def slope_of_cap(logits: Tensor, cap: float | None) -> Tensor | None:
    """Slope of ``cap * tanh(x / cap)`` where it gives ``logits``; None without a cap."""
    return None if cap is None else 1 - (logits / cap).square_()


def _raw_gradient_(probabilities: Tensor, targets: Tensor, slope: Tensor | None) -> Tensor:
    """(softmax - onehot), times the slope of the cap, in place: the nll's gradient by the scaled, uncapped logits."""
    at = targets.unsqueeze(1)
    probabilities.scatter_add_(1, at, torch.full_like(at, -1, dtype=probabilities.dtype))
    return probabilities if slope is None else probabilities.mul_(slope)


def logits_space(hidden: Tensor, weight: Tensor, chunks: list[slice]) -> Tensor | None:
    """Room for the logits of any of the chunks, where they need no wider type; a fresh buffer for each costs page faults."""
    if not chunks or hidden.dtype != accurate_dtype(hidden.dtype):
        return None
    return hidden.new_empty(chunks[0].stop, len(weight))


def _bend_(raw: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """Logits from the products with the head's weight, in their place."""
    if bias is not None:
        raw += bias
    if scale != 1.0:
        raw *= scale
    return raw if cap is None else raw.div_(cap).tanh_().mul_(cap)


def _bend(raw: Tensor, scale: float, cap: float | None) -> Tensor:
    scaled = raw if scale == 1.0 else raw * scale
    return scaled if cap is None else torch.tanh(scaled / cap) * cap


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
