"""What every adapter promises, one matrix over all of them."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from ftrun import registry
from ftrun.errors import CheckpointError, ComponentError, ConfigError

SMALL = {"r": 4, "lora_alpha": 8}
CASES = {
    "none": ("none", {}),
    "lisa": ("lisa", {"layers": 1, "interval": 2}),
    "lora": ("lora", SMALL),
    "lora-attention": ("lora", SMALL | {"target_modules": "attention"}),
    "lora-one-layer": ("lora", SMALL | {"layers_to_transform": [1]}),
    "lora-patterns": ("lora", SMALL | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.0}}),
    "lora-rslora": ("lora", SMALL | {"use_rslora": True}),
    "lora-dora": ("lora", SMALL | {"use_dora": True}),
    "lora-random": ("lora", SMALL | {"init_lora_weights": False}),
    "lora-gaussian": ("lora", SMALL | {"init_lora_weights": "gaussian"}),
    "lora-orthogonal": ("lora", SMALL | {"init_lora_weights": "orthogonal"}),
    "lora-mica": ("lora", SMALL | {"init_lora_weights": "mica"}),
    "lora-pissa": ("lora", SMALL | {"init_lora_weights": "pissa"}),
    "lora-pissa-fast": ("lora", SMALL | {"init_lora_weights": "pissa_niter_4"}),
    "lora-pissa-rslora-patterns": (
        "lora",
        SMALL
        | {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"down_proj": 5.0},
        },
    ),
    "lora-pissa-dora": ("lora", SMALL | {"init_lora_weights": "pissa", "use_dora": True}),
    "lora-olora": ("lora", SMALL | {"init_lora_weights": "olora"}),
    "lora-eva": ("lora", SMALL | {"init_lora_weights": "eva", "calibration_batches": 3}),
    "lora-corda-ipm": ("lora", SMALL | {"init_lora_weights": "corda", "calibration_batches": 3}),
    "lora-corda-kpm": (
        "lora",
        SMALL | {"init_lora_weights": "corda", "calibration_batches": 3, "corda_config": {"corda_method": "kpm"}},
    ),
    "lora-ga": ("lora", SMALL | {"init_lora_weights": "lora_ga", "calibration_batches": 3}),
    "lora-head": ("lora", SMALL | {"modules_to_save": ["lm_head"]}),
    "lora-tokens": ("lora", SMALL | {"trainable_token_indices": [5, 6]}),
    "lora-velora": ("lora", SMALL | {"velora_config": {"num_groups": 4}}),
    "lora-bdlora": (
        "lora",
        SMALL
        | {
            "use_bdlora": {
                "target_modules_bd_a": ["o_proj"],
                "target_modules_bd_b": ["q_proj"],
                "nblocks": 2,
                "match_strict": False,
            }
        },
    ),
    "lora-alora": ("lora", SMALL | {"alora_invocation_tokens": [5]}),
    "lora-replicated": ("lora", SMALL | {"layer_replication": [[0, 2], [1, 2]]}),
    "ia3": ("ia3", {}),
    "ia3-mlp": ("ia3", {"target_modules": "mlp", "feedforward_modules": ["down_proj"]}),
    "prefix": ("prefix_tuning", {"num_virtual_tokens": 4}),
    "prefix-zero": ("prefix_tuning", {"num_virtual_tokens": 4, "init_weights": "zero"}),
    "prefix-projected": ("prefix_tuning", {"num_virtual_tokens": 4, "prefix_projection": True}),
}
NOT_BASE_AT_START = {"lora-random", "prefix", "prefix-zero", "prefix-projected", "lora-replicated"}
TRAINS_BASE = {"none", "lisa"}
CHANGES_BASE = {name for name in CASES if any(word in name for word in ("pissa", "olora", "corda", "-ga"))}
NO_MERGE = {"prefix", "prefix-zero", "prefix-projected", "lora-alora", "lora-replicated"}


@pytest.fixture(params=CASES)
def case(request):
    slot_name, knobs = CASES[request.param]
    return request.param, registry.build("adapter", slot_name, knobs)


@pytest.fixture(scope="module")
def starts():
    """Adapters and models after attaching, by case: some starts take seconds."""
    return {}


@pytest.fixture
def attached(case, fresh, context, starts):
    name, adapter = case
    if name not in starts:
        model = fresh()
        starts[name] = adapter, adapter.attach(model, context(model))
    return name, *copy.deepcopy(starts[name])


def test_starts_as_the_base(attached, fresh, logits):
    name, _, model = attached
    equal = torch.allclose(logits(model), logits(fresh()), atol=1e-5)
    assert equal == (name not in NOT_BASE_AT_START)


def test_lowers_the_loss_and_leaves_the_base_alone(attached, train):
    name, adapter, model = attached
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train(adapter, model, count=6)
    assert losses[-1] < losses[0]
    if name not in TRAINS_BASE:
        assert frozen
        now = dict(model.named_parameters())
        assert all(torch.equal(now[n], value) and now[n].grad is None for n, value in frozen.items())


def test_saved_and_loaded_on_a_fresh_base_is_the_same_model(attached, case, fresh, logits, train, tmp_path):
    name, adapter, model = attached
    train(adapter, model)
    written = adapter.save(model, tmp_path)
    assert written == tmp_path / ("model" if name in TRAINS_BASE else "adapter")
    assert not list(tmp_path.rglob("*.bin")) and list(written.glob("*.safetensors"))
    slot_name, knobs = CASES[name]
    again = registry.build("adapter", slot_name, knobs).load(fresh(), tmp_path)
    assert torch.allclose(logits(again), logits(model), atol=1e-5 if name in CHANGES_BASE else 1e-6)


def test_adapter_folder_names_its_base(attached, tiny_dir, tmp_path):
    name, adapter, model = attached
    if name in TRAINS_BASE:
        pytest.skip("writes a whole model")
    config = json.loads((adapter.save(model, tmp_path) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_dir)


def test_merge_gives_the_same_logits(attached, logits, train):
    name, adapter, model = attached
    train(adapter, model)
    before = logits(model)
    if name in NO_MERGE:
        with pytest.raises(ComponentError):
            adapter.merge(model)
        return
    merged = adapter.merge(model)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert not [n for n, _ in merged.named_parameters() if "lora_" in n or "base_layer" in n]
    assert torch.allclose(logits(merged), before, atol=1e-5)


def test_disabled_is_the_base_and_enabled_again_is_not(attached, fresh, logits, train):
    name, adapter, model = attached
    if name in TRAINS_BASE:
        assert adapter.disabled(model) is None
        return
    train(adapter, model)
    trained = logits(model)
    with adapter.disabled(model):
        inside = logits(model)
    if name != "lora-replicated":
        assert torch.allclose(inside, logits(fresh()), atol=1e-5)
    assert not torch.allclose(inside, trained, atol=1e-4)
    assert torch.equal(logits(model), trained)


def test_attach_is_the_same_every_time_and_leaves_the_global_generator_alone(case, fresh, context):
    name, _ = case
    torch.manual_seed(5)
    expected = torch.rand(3)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        model = fresh()
        model = registry.build("adapter", *CASES[name]).attach(model, context(model))
        assert torch.equal(torch.rand(3), expected)
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][n]) for n, value in results[0].items())


# ---- knobs that cannot work ----


def settings(quant="none", task="causal", **train):
    plain = {"gradient_checkpointing": False, "packing": False}
    return SimpleNamespace(
        choice=lambda slot: {"quant": quant}[slot], task=task, train=SimpleNamespace(**plain | train)
    )


@pytest.mark.parametrize(
    ("knobs", "quant", "words"),
    [
        ({"init_lora_weights": "pisa"}, "none", 'Did you mean "pissa"'),
        ({"init_lora_weights": "pissa"}, "nf4", "quant=none"),
        ({"init_lora_weights": "corda"}, "int8", "quant=none"),
        ({"init_lora_weights": "loftq"}, "none", "quant=nf4"),
        ({"init_lora_weights": "loftq"}, "int8", "quant=nf4"),
        ({"use_bdlora": {"nblocks": 2}}, "nf4", "ignores"),
        ({"eva_config": {"rho": 1.0}}, "none", "no effect"),
        ({"loftq_iterations": 3}, "none", "no effect"),
        ({"layers_pattern": "layers"}, "none", "no effect"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "none", "even"),
        ({"lora_bias": True, "use_dora": True}, "none", "plain LoRA"),
        ({"use_dora": True, "velora_config": {}, "alora_invocation_tokens": [1]}, "none", "exclude"),
        ({"r": 0}, "none", "1 or more"),
        ({"lora_dropout": 1.0}, "none", "from 0 to 1"),
    ],
)
def test_lora_refuses(knobs, quant, words):
    with pytest.raises(ConfigError) as caught:
        registry.build("adapter", "lora", knobs).check(settings(quant))
    assert words in str(caught.value)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "loftq"])
def test_lora_accepts_on_nf4(init):
    registry.build("adapter", "lora", {"init_lora_weights": init}).check(settings("nf4"))


@pytest.mark.parametrize("wrong", [{"packing": True}, {"gradient_checkpointing": True}, {"task": "classify"}])
def test_prefix_tuning_refuses(wrong):
    with pytest.raises(ConfigError):
        registry.build("adapter", "prefix_tuning").check(settings(**wrong))
    registry.build("adapter", "prefix_tuning").check(settings())


def test_unknown_target_is_a_config_error(fresh, context):
    model = fresh()
    with pytest.raises(ConfigError, match="nowhere"):
        registry.build("adapter", "lora", {"target_modules": ["nowhere"]}).attach(model, context(model))


def test_eva_says_when_micro_batches_are_too_small(fresh, context):
    model = fresh()
    adapter = registry.build("adapter", "lora", {"r": 64, "init_lora_weights": "eva"})
    with pytest.raises(ConfigError, match="128 trained tokens"):
        adapter.attach(model, context(model))


def test_kinds_reach_their_linears_only(fresh, context):
    model = fresh()
    wrapped = registry.build("adapter", "lora", {"target_modules": ["mlp", "q_proj"], "layers_to_transform": 0}).attach(
        model, context(model)
    )
    adapted = {n.split(".lora_A")[0].split("layers.")[1] for n, p in wrapped.named_parameters() if ".lora_A." in n}
    assert adapted == {"0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj", "0.self_attn.q_proj"}


def test_eva_shares_out_the_rank_budget_along_principal_directions(fresh, context):
    model = fresh()
    wrapped = registry.build("adapter", "lora", CASES["lora-eva"][1]).attach(model, context(model))
    directions = [p.detach() for n, p in wrapped.named_parameters() if ".lora_A." in n]
    assert sum(len(a) for a in directions) == 4 * 14  # r for each of the linears of two layers
    assert all(torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-4) for a in directions)


def test_eva_finds_the_direction_of_most_variance(fresh, context):
    """The first row of A is the first principal component of the layer's inputs at trained positions."""
    model = fresh()
    ctx = context(model)
    batch = ctx.calibration(1)[0]
    inputs = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda _, given, __: inputs.append(given[0].detach())
    )
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    seen = inputs[0][(batch.loss_weight > 0) & (batch.sequence >= 0)]
    expected = torch.linalg.svd(seen - seen.mean(0)).Vh[0]
    knobs = {
        "r": 4,
        "init_lora_weights": "eva",
        "calibration_batches": 1,
        "eva_config": {"rho": 1.0},
        "target_modules": ["down_proj"],
    }
    wrapped = registry.build("adapter", "lora", knobs).attach(model, ctx)
    found = wrapped.get_base_model().model.layers[0].mlp.down_proj.lora_A["default"].weight[0]
    assert (found @ expected).abs() > 0.98


def test_corda_methods_take_opposite_ends_of_one_decomposition(fresh, context):
    """With full rank both ends are everything: the two methods leave the same (empty) residual."""
    residuals = []
    for method in ("ipm", "kpm"):
        model = fresh()
        knobs = {
            "r": 16,
            "target_modules": "k",
            "init_lora_weights": "corda",
            "calibration_batches": 6,
            "corda_config": {"corda_method": method},
        }
        wrapped = registry.build("adapter", "lora", knobs).attach(model, context(model))
        residuals.append(wrapped.get_base_model().model.layers[0].self_attn.k_proj.base_layer.weight)
    assert all(residual.abs().max() < 1e-3 for residual in residuals)


def test_resume_notices_another_start(fresh, context):
    model, other = fresh(), fresh()
    adapter = registry.build("adapter", "lora", CASES["lora-pissa-fast"][1])
    adapter.attach(model, context(model))
    state = adapter.state_dict()
    adapter.load_state_dict(state)
    second = registry.build("adapter", "lora", {"r": 4, "lora_alpha": 8, "init_lora_weights": "olora"})
    second.attach(other, context(other))
    with pytest.raises(CheckpointError, match="another start"):
        second.load_state_dict(state)
