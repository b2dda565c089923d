"""LISA and the mechanism of active sets below it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ftrun.adapters.full.none import FullFineTuning
from ftrun.adapters.layers.lisa import Lisa
from ftrun.errors import ConfigError

LAYERS = 5


@pytest.fixture(scope="module")
def deep_dir(tmp_path_factory):
    """A five-layer Llama with an untied head."""
    folder = tmp_path_factory.mktemp("deep-llama")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def deep(deep_dir):
    return lambda: AutoModelForCausalLM.from_pretrained(deep_dir, dtype=torch.float32)


@pytest.fixture
def attached(deep, context):
    def make(seed=0, **knobs):
        adapter, model = Lisa(**knobs), deep()
        return adapter, adapter.attach(model, context(model, seed=seed))

    return make


def size(module):
    return sum(p.numel() for p in module.parameters())


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adamw(adapter, model, rate=1e-3, decay=0.0):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=decay)
    adapter.bind(optimizer)
    return optimizer


def drawn(adapter, steps):
    sequence = []
    for step in range(steps):
        adapter.before_step(step)
        sequence.append(list(adapter.active))
    return sequence


def test_everything_trains_while_the_optimiser_is_built(attached):
    adapter, model = attached(layers=1)
    assert all(p.requires_grad for p in model.parameters())
    optimizer = adamw(adapter, model)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == size(model)


def test_trainable_count_is_everything_outside_plus_the_drawn_layers(attached):
    adapter, model = attached(layers=2)
    adapter.before_step(0)
    outside = size(model.get_input_embeddings()) + size(model.lm_head) + size(model.model.norm)
    assert trainable(model) == outside + 2 * size(model.model.layers[0])


def test_tied_embeddings_count_once(fresh, context):
    model = fresh()
    adapter = Lisa(layers=1)
    adapter.attach(model, context(model))
    adapter.before_step(0)
    assert trainable(model) == size(model.get_input_embeddings()) + size(model.model.norm) + size(model.model.layers[0])


def test_without_embeddings_only_layers_and_final_norm_train(attached):
    adapter, model = attached(layers=2, train_embeddings=False)
    adapter.before_step(0)
    assert trainable(model) == size(model.model.norm) + 2 * size(model.model.layers[0])


def test_each_switch_draws_distinct_layers_at_the_interval_only(attached):
    adapter, _ = attached(layers=3, interval=4)
    sequence = drawn(adapter, 200)
    for start in range(0, 200, 4):
        assert all(active == sequence[start] for active in sequence[start : start + 4])
        assert len(set(sequence[start])) == 3
    counts = torch.bincount(torch.tensor(sequence).flatten(), minlength=LAYERS) / len(sequence)
    assert counts.min() > 0.4 and counts.max() < 0.8  # uniform: 3 / 5 each


def test_only_drawn_layers_move(attached, train):
    """Layers that were never drawn stay bit-identical to the base, weight decay or not."""
    adapter, model = attached(layers=1, interval=2)
    before = copy.deepcopy(model.state_dict())
    optimizer = adamw(adapter, model, decay=0.1)
    seen = set()
    for step in range(6):
        train(adapter, model, count=1, optimizer=optimizer, first=step)
        seen |= set(adapter.active)
    assert 0 < len(seen) < LAYERS
    for index, layer in enumerate(model.model.layers):
        same = all(
            torch.equal(value, before[f"model.layers.{index}.{name}"]) for name, value in layer.state_dict().items()
        )
        assert same == (index not in seen)


def test_leavers_have_no_gradient_and_do_not_move_by_momentum(attached, train):
    adapter, model = attached(layers=1, interval=1, state="keep")
    optimizer = adamw(adapter, model, decay=0.1)
    for step in range(8):
        before = copy.deepcopy(model.model.layers.state_dict())
        train(adapter, model, count=1, optimizer=optimizer, first=step)
        after = model.model.layers.state_dict()
        moved = {int(name.split(".")[0]) for name in after if not torch.equal(after[name], before[name])}
        assert moved == set(adapter.active)
        assert all(
            p.grad is None
            for i, layer in enumerate(model.model.layers)
            if i not in adapter.active
            for p in layer.parameters()
        )


def states(optimizer, model):
    return {i for i, layer in enumerate(model.model.layers) if any(p in optimizer.state for p in layer.parameters())}


@pytest.mark.parametrize("state", ["drop", "keep", "offload", "reset_all"])
def test_state_of_sleeping_layers(attached, train, state):
    adapter, model = attached(layers=1, interval=2, state=state)
    optimizer = adamw(adapter, model)
    seen = set()
    for step in range(8):
        switched = step % 2 == 0 and step > 0
        train(adapter, model, count=1, optimizer=optimizer, first=step)
        seen |= set(adapter.active)
        assert states(optimizer, model) == (set(adapter.active) if state in ("drop", "reset_all") else seen)
        counter = int(optimizer.state[model.lm_head.weight]["step"])
        assert counter == (1 if switched or step == 0 else 2) if state == "reset_all" else counter == step + 1


def test_dropped_state_restarts_the_step_counter(attached, train):
    """The first update after re-activation is lr * sign(gradient): Adam without memory."""
    adapter, model = attached(layers=LAYERS, interval=1, state="drop")
    adapter.draw = lambda switch, blocks, generator: [switch % 2]  # 0, 1, 0: layer 0 leaves and comes back
    optimizer = adamw(adapter, model, rate=1e-3)
    train(adapter, model, count=2, optimizer=optimizer)
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    train(adapter, model, count=1, optimizer=optimizer, first=2)
    step = (weight - before).abs().flatten()
    assert int(optimizer.state[weight]["step"]) == 1
    assert torch.quantile(step, 0.1) > 0.99e-3 and step.max() < 1.01e-3


def test_all_layers_with_kept_state_is_full_fine_tuning(attached, deep, context, train):
    adapter, model = attached(layers=LAYERS, interval=2, state="keep")
    train(adapter, model, count=6, optimizer=adamw(adapter, model))
    full, other = FullFineTuning(), deep()
    full.attach(other, context(other))
    train(full, other, count=6, optimizer=adamw(full, other))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_same_seed_same_sequence_whatever_the_global_generators_did(attached):
    first, second, other = attached(seed=3)[0], attached(seed=3)[0], attached(seed=4)[0]
    expected = drawn(first, 100)
    torch.rand(7)
    assert drawn(second, 100) == expected
    assert drawn(other, 100) != expected


@pytest.mark.parametrize("state", ["drop", "keep", "offload", "reset_all"])
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_resumed_run_equals_the_uninterrupted_one(attached, train, stop, state):
    knobs = {"layers": 1, "interval": 2, "state": state}
    adapter, model = attached(**knobs)
    train(adapter, model, count=7, optimizer=adamw(adapter, model))

    begun, first = attached(**knobs)
    optimizer = adamw(begun, first)
    train(begun, first, count=stop, optimizer=optimizer)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), begun.state_dict()))

    resumed, second = attached(**knobs)
    optimizer = adamw(resumed, second)
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    assert [p.requires_grad for p in second.parameters()] == [p.requires_grad for p in first.parameters()]
    train(resumed, second, count=7 - stop, optimizer=optimizer, first=stop)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))


def test_saved_model_keeps_its_tokenizer(tiny_dir, fresh, context, tmp_path):
    from transformers import AutoTokenizer

    model = fresh()
    ctx = context(model)
    ctx.bundle.tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    adapter = Lisa(layers=1)
    folder = adapter.save(adapter.attach(model, ctx), tmp_path)
    assert AutoTokenizer.from_pretrained(folder).chat_template == ctx.bundle.tokenizer.chat_template


def test_more_layers_than_there_are_is_refused(attached):
    with pytest.raises(ConfigError, match="6 of 5"):
        attached(layers=6)
