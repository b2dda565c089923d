"""Fused steps of a decoder layer for CPUs: few passes over memory, few tensors kept for the backward pass.

Each function computes what the plain modules of transformers and peft compute, to rounding, and has its own gradient.
A CPU spends its time on memory: every operation that is not a matrix product reads and writes whole activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 64  # queries whose scores exist at one time; keys after the block are never touched


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).square_().div_(hidden.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = ((hidden * scale).mul_(upstream)).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        gradient = upstream * weight
        along = torch.linalg.vecdot(gradient, hidden).unsqueeze(-1)
        along = along.mul_(scale.pow(3)).div_(-hidden.shape[-1])
        return gradient.mul_(scale).addcmul_(hidden, along), d_weight, None


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * hidden / sqrt(mean(hidden^2) + eps)`` over the last axis."""
    return _RmsNorm.apply(hidden, weight, eps)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate = upstream * up
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate, F.silu(gate).mul_(upstream)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``; the activation is computed again in the backward pass."""
    return _SwiGlu.apply(gate, up)


class _FrozenMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        gate, up = F.linear(hidden, w_gate), F.linear(hidden, w_up)
        ctx.save_for_backward(gate, up, w_gate, w_up, w_down)
        return F.linear(F.silu(gate).mul_(up), w_down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, w_gate, w_up, w_down = ctx.saved_tensors
        shape, width = upstream.shape, gate.shape[-1]
        gate, up = gate.reshape(-1, width), up.reshape(-1, width)
        d_product = upstream.reshape(-1, shape[-1]) @ w_down
        d_gate = d_product * up
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        d_hidden = d_gate @ w_gate
        del d_gate
        d_hidden.addmm_(d_product.mul_(F.silu(gate)), w_up)
        return d_hidden.view((*shape[:-1], w_gate.shape[1])), None, None, None


def frozen_mlp(hidden: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """``(silu(hidden Wg') * hidden Wu') Wd'`` with weights (out, in) that get no gradient."""
    return _FrozenMlp.apply(hidden, w_gate, w_up, w_down)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, low: Tensor, weight: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(low, weight)
        ctx.scale = scale
        ctx.mark_dirty(output)
        output.view(-1, output.shape[-1]).addmm_(low.reshape(-1, low.shape[-1]), weight.T, alpha=scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        low, weight = ctx.saved_tensors
        flat = upstream.reshape(-1, upstream.shape[-1])
        d_low = d_weight = None
        if ctx.needs_input_grad[1]:
            d_low = (flat @ weight).mul_(ctx.scale).view_as(low)
        if ctx.needs_input_grad[2]:
            d_weight = (flat.T @ low.reshape(-1, low.shape[-1])).mul_(ctx.scale)
        return upstream, d_low, d_weight, None


def add_low_rank_(output: Tensor, low: Tensor, weight: Tensor, scale: float) -> Tensor:
    """``output + scale * low weight'`` in place of ``output``, which nothing else may need; weight is (out, rank)."""
    return _AddLowRank.apply(output, low, weight, scale)


# ---- attention ----


class _CausalAttention(torch.autograd.Function):
    """Blocks of queries against all keys up to the end of their block, document by document.

    Query heads that share a key head lie beside each other, so that one product serves the whole group:
    queries are (key heads, time, group, size), keys and values (key heads, time, size).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, ends: Sequence[int], scale: float
    ) -> Tensor:
        time, heads, size = query.shape
        key_heads = key.shape[1]
        group = heads // key_heads
        q = _rotated(query.view(time, key_heads, group, size).permute(1, 0, 2, 3), cos[:, None], sin[:, None])
        k = _rotated(key.transpose(0, 1), cos, sin)
        v = value.transpose(0, 1)
        out = query.new_empty(key_heads, time, group, v.shape[-1])
        log_sum = query.new_empty(key_heads, time * group, 1)
        for first, start, end in _blocks(ends):
            rows = slice(start * group, end * group)
            scores = _scores(q, k, first, start, end, group, scale)
            highest = scores.amax(-1, keepdim=True)
            total = scores.sub_(highest).exp_().sum(-1, keepdim=True)
            torch.bmm(scores, v[:, first:end], out=out.view(key_heads, time * group, -1)[:, rows])
            out.view(key_heads, time * group, -1)[:, rows].div_(total)
            log_sum[:, rows] = total.log_().add_(highest)
        result = out.permute(1, 0, 2, 3).reshape(time, -1)
        ctx.save_for_backward(q, k, value, result, log_sum, cos, sin)
        ctx.ends, ctx.scale = ends, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, value, result, log_sum, cos, sin = ctx.saved_tensors
        key_heads, time, group, size = q.shape
        v = value.transpose(0, 1)
        shape = (time, key_heads, group, v.shape[-1])
        d_out = upstream.reshape(shape).permute(1, 0, 2, 3).reshape(key_heads, time * group, -1)
        product = (upstream * result).view(shape).sum(-1)
        correction = product.permute(1, 0, 2).reshape(key_heads, time * group, 1)
        d_q = torch.empty_like(q).view(key_heads, time * group, size)
        d_k, d_v = torch.zeros_like(k), torch.zeros(v.shape, dtype=v.dtype)
        for first, start, end in _blocks(ctx.ends):
            rows, columns = slice(start * group, end * group), slice(first, end)
            p = _scores(q, k, first, start, end, group, ctx.scale).sub_(log_sum[:, rows]).exp_()
            d_v[:, columns].baddbmm_(p.transpose(1, 2), d_out[:, rows])
            d_scores = torch.bmm(d_out[:, rows], v[:, columns].transpose(1, 2))
            d_scores.sub_(correction[:, rows]).mul_(p)
            torch.bmm(d_scores, k[:, columns], out=d_q[:, rows])
            d_k[:, columns].baddbmm_(d_scores.transpose(1, 2), q.view(key_heads, -1, size)[:, rows], alpha=ctx.scale)
        d_q = d_q.view_as(q).mul_(ctx.scale)
        d_query = _rotated_back(d_q, cos[:, None], sin[:, None]).permute(1, 0, 2, 3).reshape(time, -1, size)
        d_key = _rotated_back(d_k, cos, sin).transpose(0, 1)
        return d_query, d_key, d_v.transpose(0, 1), None, None, None, None


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, ends: Sequence[int], scale: float
) -> Tensor:
    """Rotary causal attention of documents that lie one after the other, (time, heads * size).

    query: (time, heads, size); key, value: (time, key heads, size); cos, sin: (time, size), both halves equal;
    ends: where each document ends, rising to ``time``.
    """
    return _CausalAttention.apply(query, key, value, cos, sin, ends, scale)


def _blocks(ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start of the document, start and end of the block of queries) for every block."""
    first = 0
    for end in ends:
        for start in range(first, end, QUERY_BLOCK):
            yield first, start, min(start + QUERY_BLOCK, end)
        first = end


def _scores(q: Tensor, k: Tensor, first: int, start: int, end: int, group: int, scale: float) -> Tensor:
    """Scaled scores of the queries start..end with the keys first..end, (key heads, queries * group, keys)."""
    queries = q.view(q.shape[0], -1, q.shape[-1])[:, start * group : end * group]
    scores = torch.bmm(queries, k[:, first:end].transpose(1, 2)).mul_(scale)
    scores[:, :, start - first :].add_(_future(end - start, group))
    return scores


@lru_cache(maxsize=QUERY_BLOCK * 2)
def _future(queries: int, group: int) -> Tensor:
    """-inf where a key comes after the query, (queries * group, queries)."""
    mask = torch.full((queries, queries), float("-inf")).triu_(1)
    return mask.repeat_interleave(group, dim=0)


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding with halves paired, a contiguous copy; cos and sin broadcast."""
    out = torch.empty(states.shape, dtype=states.dtype)
    half = states.shape[-1] // 2
    low, high, cos, sin = states[..., :half], states[..., half:], cos[..., :half], sin[..., :half]
    torch.mul(low, cos, out=out[..., :half]).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out[..., half:]).addcmul_(low, sin)
    return out


def _rotated_back(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotated(gradient, cos, -sin)
