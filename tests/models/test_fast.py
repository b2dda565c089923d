"""The fused kernels give what the plain modules give: values, gradients, and packed rows as rows alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ftrun.data.batches import micro_batches
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.models import kernels
from ftrun.models.architecture import describe
from ftrun.models.fast import FastAttention, packs_for_free, speed_up
from ftrun.training.view import StepView

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "attn_implementation": "sdpa_documents",
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
}
LENGTHS = (150, 3, 70, 64, 2)  # across blocks of queries, exactly one block, and hardly anything


@pytest.fixture(params=sorted(FAMILIES))
def model(request) -> nn.Module:
    torch.manual_seed(0)
    made = FAMILIES[request.param]()
    for name, parameter in made.named_parameters():  # norms of all ones and small weights would hide mistakes
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return made


@pytest.fixture
def table() -> TokenTable:
    draw = np.random.default_rng(0)
    sequences = []
    for record, length in enumerate(LENGTHS):
        weight = draw.integers(0, 2, length).astype(np.float32)
        weight[-1] = 1
        sequences.append(Sequence(draw.integers(0, 97, length).astype(np.int32), weight, record))
    return TokenTable.from_sequences(sequences)


def with_lora(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=dropout)
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped


def loss_and_gradients(model: nn.Module, table: TokenTable, packing: bool) -> tuple[float, dict[str, torch.Tensor]]:
    architecture = describe(model)
    model.train().zero_grad()
    total = 0.0
    for batch in micro_batches(table, np.arange(len(table)), 4096, packing, 0):
        loss = StepView(model, architecture, batch).token_nll.sum() / 100
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["full", "lora", "frozen_norms"])
def test_same_loss_and_gradients_as_the_plain_model(kind, model, table):
    """Also packed: every document sees itself only."""
    if kind == "lora":
        model = with_lora(model)
    elif kind == "frozen_norms":  # the fused mlp needs frozen linears
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name or "embed" in name)
    fast = copy.deepcopy(model)
    assert speed_up(fast)
    expected, gradients = loss_and_gradients(model, table, packing=False)
    for packing in (False, True):
        loss, found = loss_and_gradients(fast, table, packing)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6 * float(gradient.abs().max()) + 1e-6)


def test_dropout_draws_the_same_numbers(model, table):
    model = with_lora(model, dropout=0.3)
    fast = copy.deepcopy(model)
    speed_up(fast)
    results = []
    for one in (model, fast):
        torch.manual_seed(5)
        results.append(loss_and_gradients(one, table, packing=False)[0])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_generation_with_a_cache_is_unchanged(model):
    fast = copy.deepcopy(model)
    speed_up(fast)
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # padded on the left
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.eval().generate(ids, **arguments), fast.eval().generate(ids, **arguments))


def test_switched_off_adapter_is_the_base(model, table):
    plain = copy.deepcopy(model).eval()
    wrapped = with_lora(model).eval()
    speed_up(wrapped)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad(), wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def test_speed_up_twice_changes_nothing_more(model):
    assert speed_up(model)
    assert speed_up(model) == []
    assert packs_for_free(model, describe(model))
    assert next(type(m).__name__ for m in model.modules() if isinstance(m, FastAttention)).endswith("Attention")


def test_another_formula_under_a_known_name_stays_plain():
    """A norm that multiplies by 1 + weight is recognised by what it computes."""

    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(48)), 1e-6

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return (1 + self.weight) * F.rms_norm(states, (48,), eps=1e-6)

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.model.norm = LlamaRMSNorm()
    speed_up(model)
    assert type(model.model.norm) is LlamaRMSNorm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_stay_plain(dtype, model):
    assert speed_up(model.to(dtype)) == []


def test_saved_and_loaded_as_before(model, tmp_path):
    speed_up(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_attention_by_finite_differences_and_by_sdpa(key_heads):
    """In float64: two documents, rotated, against sdpa under a mask."""
    torch.manual_seed(1)
    time, heads, size = 9, 6, 4
    query = torch.randn(time, heads, size, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(time, key_heads, size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    angles = torch.randn(time, size // 2, dtype=torch.float64).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def fused(q, k, v):
        return kernels.causal_attention(q, k, v, cos, sin, [4, 9], 0.5)

    document = torch.tensor([0] * 4 + [1] * 5)
    seen = (document[:, None] == document[None]) & torch.ones(time, time, dtype=torch.bool).tril()
    q, k = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos[None], sin[None])
    v = value.transpose(0, 1)[None]
    own = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(fused(query, key, value), own[0].transpose(0, 1).reshape(time, -1))
    assert torch.autograd.gradcheck(fused, (query, key, value))


def test_small_kernels_by_finite_differences():
    torch.manual_seed(2)
    x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, w: kernels.rms_norm(x, w, 1e-3), (x, w))
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(kernels.swiglu, (gate, up))
    frozen = [torch.randn(*shape, dtype=torch.float64) for shape in ((7, 5), (7, 5), (5, 7))]
    assert torch.autograd.gradcheck(lambda x: kernels.frozen_mlp(x, *frozen), (x,))
    low, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (5, 2)))
    assert torch.autograd.gradcheck(lambda x, low, w: kernels.add_low_rank_(x * 1, low, w, 0.7), (x, low, weight))
