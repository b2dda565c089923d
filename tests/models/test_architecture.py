"""The architecture map, the states it gives and the head, on every family."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from ftrun.data.batches import Batch, collate
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError
from ftrun.models import varlen
from ftrun.models.architecture import describe
from ftrun.models.head import token_nll
from ftrun.models.wrappers import unwrap

VOCABULARY, WIDTH, LAYERS = 96, 32, 2  # of the models in conftest.py
LENGTHS = [11, 1, 17, 5]


# further families whose head bends its logits, or whose layers carry a state from token to token
OTHERS = {
    "cohere2": {"logit_scale": 0.3},
    "nanochat": {"final_logit_softcapping": 2.0},
    "vaultgemma": {"final_logit_softcapping": 2.0},
    "granitemoe": {"logits_scaling": 3.0, "num_local_experts": 2, "num_experts_per_tok": 1},
    "hyperclovax": {"logits_scaling": 2.0},  # multiplies where Granite divides
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48},
    "falcon_h1": {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 8},
    "lfm2": {"layer_types": ["full_attention", "conv"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def table() -> TokenTable:
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, VOCABULARY, size=length).astype(np.int32) for length in LENGTHS]
    return TokenTable.from_sequences([Sequence(ids, np.ones(len(ids), np.float32), i) for i, ids in enumerate(rows)])


def alone(table: TokenTable) -> list[Batch]:
    return [collate(table, [[index]], 0) for index in range(len(table))]


def test_parts_are_found(make, family):
    model = make(family)
    found = describe(model)
    assert found.causal and len(found.layers) == LAYERS
    assert found.width == WIDTH and found.vocabulary == VOCABULARY
    assert model.get_submodule(found.embeddings[0]) is model.get_input_embeddings()
    assert model.get_submodule(found.head_name) is model.get_output_embeddings()
    assert found.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert found.final_norm is not None and found.block_of(found.final_norm + ".weight") is None
    assert len(found.embeddings) == (2 if family in ("gpt2", "opt") else 1)  # learned positions
    assert found.norms and all(found.block_of(name) is not None for name in found.norms)


def test_every_linear_has_a_known_kind(make, family):
    model = make(family)
    found = describe(model)
    kinds = [{linear.kind for linear in found.linears if linear.block == block} for block in range(LAYERS)]
    assert kinds[0] == kinds[1]
    attention = {"q", "k", "v", "o"} if family not in ("phi3", "gpt2", "gpt_neox") else {"qkv", "o"}
    mlp = {"phi3": {"gate_up", "down"}} | {name: {"up", "down"} for name in ("gpt2", "gpt_neox", "opt")}
    assert kinds[0] == attention | mlp.get(family, {"gate", "up", "down"})


def test_all_parameters_are_placed(make, family):
    """A parameter lies in a layer, or belongs to embeddings, final norm or head."""
    model = make(family)
    found = describe(model)
    outside = (*found.embeddings, found.final_norm, found.head_name)
    for name, _ in model.named_parameters():
        assert (found.block_of(name) is None) == name.startswith(outside), name


@pytest.mark.parametrize("kinds", [("all",), ("attention",), ("mlp",), ("q", "v"), ("o",), ("down",)])
def test_linear_names_mean_exactly_what_was_asked_for(make, family, kinds):
    """Read as peft reads target_modules, over all modules of the model."""
    model = make(family)
    found = describe(model)
    names = found.linear_names(kinds)
    matched = {name for name, _ in model.named_modules() if any(name == n or name.endswith("." + n) for n in names)}
    assert matched == set().union(*(found._names_of(kind) for kind in kinds))
    assert len(matched) % LAYERS == 0 and len(names) <= 7


def test_short_names(make):
    assert describe(make("llama")).linear_names(["q", "v"]) == ["q_proj", "v_proj"]
    assert describe(make("gpt2")).linear_names(["o"]) == ["attn.c_proj"]
    assert describe(make("phi3")).linear_names(["q", "k"]) == ["qkv_proj"]
    with pytest.raises(ConfigError, match='no "gate" linears'):
        describe(make("gpt2")).linear_names(["gate"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_states_and_head_give_the_models_logits(make, family, attention, table):
    """Right-padded rows without any mask equal the model's own masked forward, at every real position."""
    model = make(family, attention)
    found = describe(model)
    assert found.plain_head
    batch = collate(table, [[index] for index in range(len(table))], 0)
    with torch.no_grad():
        ours = found.head(model).logits(found.hidden_states(model, batch))
        own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    real = batch.attention_mask.bool()
    torch.testing.assert_close(ours[real], own[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(make, family, table):
    """Their logits are right with the fast head or their own; packed rows are right or refused, never mixed."""
    model = make(family, **OTHERS[family])
    found = describe(model)
    packed = collate(table, [[2, 0]], 0)
    with torch.no_grad():
        states = [found.hidden_states(model, collate(table, [[index]], 0))[0] for index in (2, 0)]
        own = model(input_ids=collate(table, [[2]], 0).input_ids, use_cache=False).logits[0]
        torch.testing.assert_close(found.head(model).logits(states[0]), own, rtol=1e-5, atol=1e-5)
        if family in ("falcon_h1", "lfm2"):
            with pytest.raises(ConfigError, match="mixes the documents"):
                found.hidden_states(model, packed)
        else:
            torch.testing.assert_close(found.hidden_states(model, packed)[0], torch.cat(states), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager", varlen.NAME])
@pytest.mark.parametrize("groups", [[[0, 1, 2], [3]], [[1, 2, 0, 3]]], ids=["two rows", "one row"])
def test_packed_equals_separate(make, family, attention, groups, table):
    model = make(family, attention)
    found = describe(model)
    packed = collate(table, groups, 0)
    assert packed.packed
    with torch.no_grad():
        together = found.hidden_states(model, packed)
        for number, index in enumerate(packed.table_index.tolist()):
            states = found.hidden_states(model, collate(table, [[index]], 0))[0]
            torch.testing.assert_close(together[packed.sequence == number], states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", varlen.NAME])
def test_packed_gradient_equals_separate(make, family, attention, table):
    model = make(family, attention)
    found = describe(model)

    def gradient(batches: list[Batch]) -> torch.Tensor:
        model.zero_grad()
        for batch in batches:
            hidden = found.hidden_states(model, batch)[batch.predicting]
            token_nll(hidden, found.head(model), batch.target_ids).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    packed, separate = gradient([collate(table, [[2, 0, 1, 3]], 0)]), gradient(alone(table))
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5 * float(separate.abs().max()))


def test_lora_wrapped(make, family, table):
    """Described before peft wraps: states, head and names stay right, on the head too."""
    from peft import LoraConfig, get_peft_model

    model = make(family, tie_word_embeddings=False)
    found = describe(model)
    targets = [*found.linear_names(["q", "v", "down"]), found.head_name]
    wrapped = get_peft_model(model, LoraConfig(target_modules=targets, r=4, init_lora_weights=False)).eval()
    assert unwrap(wrapped) is model and found.layers[0] is wrapped.get_submodule(
        f"base_model.model.{found.layers_name}.0"
    )
    batch = collate(table, [[0], [2]], 0)
    with torch.no_grad():
        hidden = found.hidden_states(wrapped, batch)
        own = wrapped(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        real = batch.attention_mask.bool()
        head = found.head(wrapped)
        assert head.forward is not None  # LoRA on the head: no plain weight
        torch.testing.assert_close(head.logits(hidden)[real], own[real], rtol=1e-5, atol=1e-5)
    blocks = {found.block_of(name) for name, p in wrapped.named_parameters() if "lora_" in name}
    assert blocks == {None, *range(LAYERS)}


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3_text"])
def test_virtual_tokens(make, family, method, table):
    """States of the real tokens are returned, and they see the virtual ones; a packed row is refused."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    kind = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
    model = make(family)
    found = describe(model)
    torch.manual_seed(1)
    wrapped = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    batch = collate(table, [[0], [2]], 0)
    with torch.no_grad():
        hidden = found.hidden_states(wrapped, batch)
        assert hidden.shape == (*batch.input_ids.shape, WIDTH)
        own = wrapped(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        real = batch.attention_mask.bool()
        own = own[:, -batch.input_ids.shape[1] :]
        torch.testing.assert_close(found.head(wrapped).logits(hidden)[real], own[real], rtol=1e-5, atol=1e-5)
        with wrapped.disable_adapter():
            assert not torch.allclose(found.hidden_states(wrapped, batch)[real], hidden[real], atol=1e-4)
    with pytest.raises(ConfigError, match="virtual tokens"):
        found.hidden_states(wrapped, collate(table, [[0, 2]], 0))


class Doubled(nn.Linear):
    """A head that structure alone does not explain."""

    def forward(self, states):
        return 2 * super().forward(states)


def test_unknown_head_goes_through_the_model(make, table):
    model = make("llama", tie_word_embeddings=False)
    model.lm_head.__class__ = Doubled
    found = describe(model)
    batch = collate(table, [[0]], 0)
    with torch.no_grad():
        ours = found.head(model).logits(found.hidden_states(model, batch))
        torch.testing.assert_close(ours, model(batch.input_ids).logits)


def test_unknown_formula_is_noticed(make, table):
    """A model that bends its logits in a way no config attribute tells is not trusted to the fast head."""
    model = make("granite")
    model.logits_scaling, kept = 7.0, model.config.logits_scaling  # the code's value and the config's disagree
    assert kept != 7.0
    found = describe(model)
    batch = collate(table, [[0]], 0)
    with torch.no_grad():
        ours = found.head(model).logits(found.hidden_states(model, batch))
        torch.testing.assert_close(ours, model(batch.input_ids).logits)


def test_encoder_classifier():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=5, **sizes)).eval()
    found = describe(model)
    assert not found.causal and len(found.layers) == 3 and found.head_name == "classifier"
    assert found.embeddings[0] == "bert.embeddings.word_embeddings" and len(found.embeddings) == 3
    assert {linear.kind for linear in found.linears} == {"q", "k", "v", "o", "up", "down"}
    assert found.linear_names(["q", "v"]) == ["query", "value"]
    matched = {n for n, _ in model.named_modules() if any(n.endswith("." + t) for t in found.linear_names(["down"]))}
    assert matched == {f"bert.encoder.layer.{i}.output.dense" for i in range(3)}
    with pytest.raises(ConfigError, match="classifier"):
        found.head(model)


@contextmanager
def no_head_allowed(module: nn.Module):
    handle = module.register_forward_hook(lambda *_: pytest.fail("the whole sequence went through the head"))
    yield
    handle.remove()


def test_states_cost_no_head(make, table):
    model = make("llama")
    found = describe(model)
    with no_head_allowed(model.lm_head), torch.no_grad():
        found.hidden_states(model, collate(table, [[0]], 0))
