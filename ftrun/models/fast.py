"""Putting the fused kernels into a model that runs on a CPU.

A module gets a subclass of its own class with another ``forward``: weights, names, hooks and copies stay as they are.
Only modules whose formula was tried on the module itself are changed, and whatever a fused forward does not cover
(another dtype, a cache, dropout, a LoRA variant) goes to the plain one.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from ftrun.errors import ConfigError
from ftrun.models import kernels
from ftrun.models.wrappers import adds_virtual_tokens, unwrap

if TYPE_CHECKING:
    from ftrun.models.architecture import Architecture


class FastRmsNorm:
    """``weight * x / rms(x)`` in two passes, keeping x and one number a token."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _plain(hidden_states, self.weight):
            return super().forward(hidden_states)  # type: ignore[misc]
        return kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FastMlp:
    """``down(silu(gate(x)) * up(x))`` without keeping the activation and the product."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not _plain(x):
            return super().forward(x)  # type: ignore[misc]
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        if all(_frozen_linear(linear) for linear in linears):
            return kernels.frozen_mlp(x, *(linear.weight for linear in linears))
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class FastAttention:
    """Rotary causal attention, each document by itself, without repeating the key heads."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        rows, time, _ = hidden_states.shape
        known = cu_seq_lens_q is not None or attention_mask is None  # which keys a query may see
        covered = position_embeddings is not None and past_key_values is None and time > 1
        quiet = not (self.training and self.attention_dropout) and not kwargs.get("output_attentions")
        if not (known and covered and quiet and _plain(hidden_states)):
            given = kwargs if cu_seq_lens_q is None else kwargs | {"cu_seq_lens_q": cu_seq_lens_q}
            return super().forward(  # type: ignore[misc]
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **given,
            )
        if cu_seq_lens_q is not None:
            ends = cu_seq_lens_q.tolist()[1:]
        else:
            ends = range(time, rows * time + 1, time)
        query = self.q_proj(hidden_states).view(rows * time, -1, self.head_dim)
        key = self.k_proj(hidden_states).view(rows * time, -1, self.head_dim)
        value = self.v_proj(hidden_states).view(rows * time, -1, self.head_dim)
        assert position_embeddings is not None
        cos, sin = (table.expand(rows, -1, -1).reshape(rows * time, -1) for table in position_embeddings)
        output = kernels.causal_attention(query, key, value, cos, sin, ends, self.scaling)
        return self.o_proj(output.view(rows, time, -1)), None


class FastLora:
    """``W x + s B A x`` with the second term added in place of the first."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant)
        if not (plain and len(names) == 1 and _plain(x, self.lora_A[names[0]].weight)):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        (name,) = names
        low = self.lora_A[name](self.lora_dropout[name](x))
        output, up = self.base_layer(x), self.lora_B[name]
        if up.bias is not None or output.dtype != torch.float32:
            return output + up(low) * self.scaling[name]
        return kernels.add_low_rank_(output, low, up.weight, self.scaling[name])


# classes of transformers whose source states these formulas; what a class of another name computes is not known
FAST: dict[str, type] = {
    "LlamaRMSNorm": FastRmsNorm,
    "MistralRMSNorm": FastRmsNorm,
    "Qwen2RMSNorm": FastRmsNorm,
    "Qwen3RMSNorm": FastRmsNorm,
    "LlamaMLP": FastMlp,
    "MistralMLP": FastMlp,
    "Qwen2MLP": FastMlp,
    "Qwen3MLP": FastMlp,
    "LlamaAttention": FastAttention,
    "MistralAttention": FastAttention,
    "Qwen2Attention": FastAttention,
}


def speed_up(model: nn.Module) -> list[str]:
    """Fuse the layers of a float32 model on a CPU; what was changed, such as ``61 LlamaRMSNorm``. May be called again."""
    changed: Counter[str] = Counter()
    base: Any = unwrap(model)
    for module in base.modules():
        mixin = FastLora if _is_lora(module) else FAST.get(type(module).__name__)
        if mixin is None or isinstance(module, mixin):
            continue
        plain = type(module)
        if mixin is FastLora or _same(module, mixin, base):
            module.__class__ = _subclass(mixin, plain)
            changed[plain.__name__] += 1
    return [f"{count} {name}" for name, count in sorted(changed.items())]


def packs_for_free(model: nn.Module, architecture: Architecture) -> bool:
    """Whether rows joined into one cost no more attention than rows apart, and stay apart: then joining saves all padding.

    The second is tried on a few tokens: with 8-bit weights, for one, what else is in a batch decides how inputs are
    rounded.
    """
    whole = all(any(isinstance(part, FastAttention) for part in layer.modules()) for layer in architecture.layers)
    if not whole or adds_virtual_tokens(model):
        return False
    try:
        architecture.packing_way(model)
    except ConfigError:  # nobody has asked for it
        return False
    return True


_subclasses: dict[tuple[type, type], type] = {}


def _subclass(mixin: type, plain: type) -> type:
    """``plain`` with the forward of ``mixin``, under the same name."""
    if (mixin, plain) not in _subclasses:
        _subclasses[mixin, plain] = type(plain.__name__, (mixin, plain), {"__module__": plain.__module__})
    return _subclasses[mixin, plain]


def _is_lora(module: nn.Module) -> bool:
    if type(module) is LoraLinear:
        return True
    return type(module).__name__ == "Linear4bit" and type(module).__module__ == "peft.tuners.lora.bnb"


@torch.no_grad()
def _same(module: Any, mixin: type, base: Any) -> bool:
    """Whether the fused forward gives on a few tokens what the module's own gives."""
    floats = [p for p in module.parameters() if p.is_floating_point()]  # 4-bit weights are stored as whole numbers
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in (*floats, base.get_input_embeddings().weight)):
        return False
    width = base.get_input_embeddings().weight.shape[1]
    states = torch.linspace(-2, 2, 7 * width).sin_().view(1, 7, width)
    inputs: tuple[Any, ...] = (states,)
    if mixin is FastAttention:
        if base.config._attn_implementation not in ("sdpa", "sdpa_documents") or _windowed(module):
            return False
        angles = torch.linspace(0, 3, 7 * module.head_dim // 2).view(1, 7, -1).repeat(1, 1, 2)
        inputs = (states, (angles.cos(), angles.sin()), None)
    elif mixin is FastMlp and not isinstance(module.act_fn, (nn.SiLU, SiLUActivation)):
        return False
    if mixin is FastRmsNorm and module.weight.shape != (width,):
        return False
    training = module.training
    module.eval()
    try:
        own, fused = module(*inputs), _subclass(mixin, type(module)).forward(module, *inputs)  # type: ignore[attr-defined]
    finally:
        module.train(training)
    own, fused = (result[0] if isinstance(result, tuple) else result for result in (own, fused))
    return bool((own - fused).abs().max() <= 1e-5 * (1 + own.abs().max()))


def _windowed(module: Any) -> bool:
    return getattr(module, "sliding_window", None) is not None


def _plain(hidden: Tensor, weight: Tensor | None = None) -> bool:
    """Whether the kernels cover this call: float32 on a CPU, outside autocast."""
    right = hidden.dtype == torch.float32 and hidden.device.type == "cpu"
    return right and (weight is None or weight.dtype == torch.float32) and not torch.is_autocast_enabled("cpu")


def _frozen_linear(linear: nn.Module) -> bool:
    if type(linear) is not nn.Linear or linear.bias is not None or linear.weight.requires_grad:
        return False
    hooked = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return not hooked and linear.weight.dtype == torch.float32 and "forward" not in vars(linear)
