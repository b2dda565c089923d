"""Batches that say which token sees which, on every family, wrapped, checkpointed and fused."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from ftrun.data.batches import Batch, collate
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError
from ftrun.models import varlen
from ftrun.models.architecture import describe
from ftrun.models.checkpointing import checkpoint_activations
from ftrun.models.fast import speed_up
from ftrun.training.view import StepView

VOCABULARY = 96  # of the models in conftest.py
LENGTHS = [7, 1, 6, 5]  # below every window
NO_MASKS = {  # what holds a state that no mask reaches, or reads positions from the mask itself
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 8},
    "lfm2": {"layer_types": ["full_attention", "conv"]},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}


@pytest.fixture(scope="module")
def table() -> TokenTable:
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, VOCABULARY, size=length).astype(np.int32) for length in LENGTHS]
    return TokenTable.from_sequences([Sequence(ids, np.ones(len(ids), np.float32), i) for i, ids in enumerate(rows)])


def causal(batch: Batch) -> Tensor:
    """What every token sees of its own sequence."""
    return (batch.sequence[:, :, None] == batch.sequence[:, None, :]).tril()


def masked(batch: Batch) -> Batch:
    return replace(batch, attention=causal(batch))


@pytest.mark.parametrize("attention", ["sdpa", "eager", varlen.NAME])
@pytest.mark.parametrize("groups", [[[0], [1], [2], [3]], [[0, 1], [2, 3]]], ids=["apart", "packed"])
def test_a_causal_mask_equals_no_mask(make, family, attention, groups, table):
    model = make(family, attention)
    found = describe(model)
    batch = collate(table, groups, 0)
    with torch.no_grad():
        states = found.hidden_states(model, masked(batch))
        for number, index in enumerate(batch.table_index.tolist()):
            alone = found.hidden_states(model, collate(table, [[index]], 0))[0]
            torch.testing.assert_close(states[batch.sequence == number], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager", varlen.NAME])
def test_mask_and_positions_are_heeded(make, family, attention, table):
    """Tokens in another order with their old positions and sight have their old states."""
    model = make(family, attention)
    found = describe(model)
    batch = collate(table, [[0]], 0)
    order = torch.tensor([0, 4, 2, 6, 1, 3, 5])
    seen = causal(batch)[:, order][:, :, order]
    shuffled = replace(
        batch, input_ids=batch.input_ids[:, order], position_ids=batch.position_ids[:, order], attention=seen
    )
    with torch.no_grad():
        plain, other = found.hidden_states(model, batch), found.hidden_states(model, shuffled)
    torch.testing.assert_close(other, plain[:, order], rtol=1e-5, atol=1e-5)


def test_a_hidden_token_has_no_say(make, family, table):
    model = make(family)
    found = describe(model)
    batch = masked(collate(table, [[0]], 0))
    assert batch.attention is not None
    batch.attention[:, 3:, 2] = False
    with torch.no_grad():
        before = found.hidden_states(model, batch)
        batch.input_ids[0, 2] = (batch.input_ids[0, 2] + 7) % VOCABULARY
        after = found.hidden_states(model, batch)
    assert torch.equal(before[0, 3:], after[0, 3:]) and not torch.equal(before[0, 2], after[0, 2])


def gradients(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    found = describe(model)
    loss = StepView(model, found, batch).token_nll.sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["lora", "checkpointed", "fused", "fused lora checkpointed"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_adapters_checkpoints_and_fused_layers(kind, make, family, table):
    """Loss and gradients are those of the plain model that needs no mask."""
    plain = make(family, varlen.NAME)
    if "lora" in kind:
        plain = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    plain.train()
    changed = copy.deepcopy(plain)
    if "fused" in kind:
        assert speed_up(changed)
    if "checkpointed" in kind:
        checkpoint_activations(changed)
    batch = collate(table, [[0], [2], [3]], 0)
    loss, expected = gradients(plain, batch)
    for groups in ([[0], [2], [3]], [[0, 2, 3]]):
        changed.zero_grad()
        masked_loss, found = gradients(changed, masked(collate(table, groups, 0)))
        torch.testing.assert_close(masked_loss, loss, rtol=1e-5, atol=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def test_the_trial_does_not_meet_a_changed_embedding(make, table):
    """Whether the model takes masks is tried on first use, on other tokens than the batch's."""
    model = make("llama")
    batch = masked(collate(table, [[0], [2]], 0))

    def perturb(embeddings: Tensor, of: Batch) -> Tensor:
        assert embeddings.shape[:2] == of.input_ids.shape
        return embeddings + 1

    view = StepView(model, describe(model), batch, perturb=perturb)
    assert torch.isfinite(view.hidden).all()


@pytest.mark.parametrize("family", NO_MASKS)
def test_models_that_no_mask_reaches_are_refused(make, family, table):
    model = make(family, "eager", **NO_MASKS[family])
    with pytest.raises(ConfigError, match="does not heed a mask"):
        describe(model).hidden_states(model, masked(collate(table, [[0]], 0)))


def test_an_attention_without_masks_is_refused(make, table):
    model = make("llama")
    found = describe(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="flash_attention_2 takes no such mask") as error:
        found.hidden_states(model, masked(collate(table, [[0]], 0)))
    assert error.value.todo == "Use model.attention=sdpa."


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_rows_beyond_a_window_are_refused(make, family):
    """A mask from outside would take the window's place."""
    ids = np.arange(3, 12).astype(np.int32)
    batch = collate(TokenTable.from_sequences([Sequence(ids, np.ones(9, np.float32), 0)]), [[0]], 0)
    model = make(family)
    with pytest.raises(ConfigError, match="see 8 tokens, and rows of 9"):
        describe(model).hidden_states(model, masked(batch))
    describe(model).hidden_states(model, replace(masked(batch), position_ids=batch.position_ids.clamp(max=7)))


def test_virtual_tokens_are_refused(make, table):
    plain = make("llama")
    found = describe(plain)
    model = get_peft_model(plain, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="virtual tokens stand before a row"):
        found.hidden_states(model, masked(collate(table, [[0]], 0)))
