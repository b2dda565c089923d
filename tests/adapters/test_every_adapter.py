"""What every adapter promises, read off one run of each: those on disk and every type of peft.

What a type of peft cannot do stands in ftrun/adapters/peft_limits.py, and is tried here both ways.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ftrun import registry
from ftrun.adapters import peft_limits as limits
from ftrun.config.settings import LaunchConfig, ModelConfig
from ftrun.data.batches import collate
from ftrun.errors import ComponentError, ConfigError
from ftrun.models.architecture import describe
from ftrun.models.checkpointing import checkpoint_activations
from ftrun.models.fast import speed_up
from ftrun.models.load import load_bundle
from ftrun.stages import shape
from ftrun.training import checkpoint
from ftrun.training.checkpoint import Progress
from ftrun.training.distributed import Team

NAMES = list(registry.specs("adapter"))
TYPES = [name for name in NAMES if registry.find("adapter", name).library]
# what fits a model of width 32
SMALL = {
    "r": 4,
    "init_r": 6,
    "target_r": 3,
    "n_frequency": 20,
    "block_size": 8,
    "oft_block_size": 8,
    "group_size": 8,
    "vector_length": 16,
    "num_vectors": 8,
    "num_virtual_tokens": 4,
    "adapter_len": 3,
    "token_indices": [5, 6, 7],
    "layers": 1,
    "interval": 2,
}
OTHERS = {
    "adamss": {"use_asa": True, "init_warmup": 1, "final_warmup": 6, "mask_interval": 2, "asa_target_subspaces": 20},
    "bottleneck": {"reduction": 4},
    "oft": {"r": 0},
}
# these compute something of their own from the first step on
NOT_THE_BASE = {"c3a", "cartridge", "fourierft", "p_tuning", "prefix_tuning", "prompt_tuning", "unilora", "vblora"}
TRAINS_BASE = {name for name in NAMES if "trainable_base" in registry.find("adapter", name).needs}
QUANTS = ("nf4", "int8")
ROUNDING = {"nf4": 1e-5, "int8": 1e-2}  # of logits; int8 also rounds what goes into a layer


def knobs(name: str) -> dict[str, Any]:
    own = registry.find("adapter", name).knobs
    return {knob: value for knob, value in SMALL.items() if knob in own} | OTHERS.get(name, {})


def build(name: str) -> Any:
    return registry.build("adapter", name, knobs(name))


@dataclass
class Ran:
    """An adapter after some steps on the tiny model."""

    adapter: Any
    model: nn.Module
    losses: list[float]
    base: torch.Tensor  # logits
    start: torch.Tensor
    trained: torch.Tensor
    named: dict[str, nn.Parameter]  # what trains
    count: int
    moved: list[str]  # names of parameters that were frozen and have changed all the same
    halfway: Path  # a checkpoint after two of four steps


@pytest.fixture(scope="module")
def runs() -> dict[str, Ran]:
    return {}


@pytest.fixture(scope="module")
def team() -> Team:
    return Team(LaunchConfig())


@pytest.fixture
def ran(request, runs, team, fresh, context, logits, train, tmp_path_factory) -> Ran:
    """The one run of an adapter."""
    name = request.param
    if name not in runs:
        model, adapter = fresh(), build(name)
        base = logits(model)
        model, optimizer = begin(adapter, model, context(model))
        named = {n: p for n, p in model.named_parameters() if any(p is q for q in optimizer.param_groups[0]["params"])}
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in named}
        start = logits(model)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        losses = train(adapter, model.train(), count=2, optimizer=optimizer)
        path = checkpoint.save(tmp_path_factory.mktemp(name), Progress(step=2), named, optimizer, adapter, team)
        losses += train(adapter, model, count=2, optimizer=optimizer, first=2)
        now = dict(model.named_parameters())
        moved = [n for n, value in frozen.items() if not torch.equal(now[n], value)]
        runs[name] = Ran(adapter, model, losses, base, start, logits(model), named, count, moved, path)
    return runs[name]


def begin(adapter: Any, model: nn.Module, ctx: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As training does: attached, with an optimiser of what may train."""
    model = adapter.attach(model, ctx)
    speed_up(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    adapter.bind(optimizer)
    adapter.before_step(0)
    return model.train(), optimizer


every = pytest.mark.parametrize("ran", NAMES, indirect=True, ids=NAMES)
every_type = pytest.mark.parametrize("ran", TYPES, indirect=True, ids=TYPES)


@every
def test_starts_as_the_base(ran):
    equal = torch.allclose(ran.start, ran.base, atol=1e-5)
    assert equal == (ran.adapter.name not in NOT_THE_BASE)


@every
def test_learns_and_leaves_alone_what_does_not_train(ran):
    assert ran.losses[-1] < ran.losses[0]
    assert not torch.allclose(ran.trained, ran.start, atol=1e-6)
    assert ran.adapter.name in TRAINS_BASE or not ran.moved


@every
def test_plan_counts_what_trains(ran, tiny_dir, context, loaded):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded.config)
    name = ran.adapter.name
    settings = SimpleNamespace(slots={"adapter": (name, knobs(name))}, model=ModelConfig(path=str(tiny_dir)))
    assert shape.trained(settings, model, context(model)).active == ran.count


@every
def test_saved_and_loaded_on_a_fresh_base_is_the_same_model(ran, fresh, logits, tmp_path):
    written = ran.adapter.save(ran.model, tmp_path)
    assert list(written.glob("*.safetensors")) and not list(tmp_path.rglob("*.bin"))
    torch.manual_seed(999)
    again = build(ran.adapter.name).load(fresh(), tmp_path)
    assert torch.allclose(logits(again), ran.trained, atol=1e-5)


@every
def test_disabled_is_the_base_and_enabled_again_is_not(ran, logits):
    inside = ran.adapter.disabled(ran.model)
    if inside is None:
        assert ran.adapter.name in TRAINS_BASE | {"bottleneck"}
        return
    with inside:
        assert torch.allclose(logits(ran.model), ran.base, atol=1e-5)
    assert torch.equal(logits(ran.model), ran.trained)


@every
def test_merged_is_the_same_model_or_refused(ran, logits):
    name, model = ran.adapter.name, copy.deepcopy(ran.model)
    if name in limits.CANNOT["train.merge=true"]:
        with pytest.raises(ComponentError, match="cannot be merged"):
            ran.adapter.merge(model)
        if name in limits.TRIED:  # and the table is right
            with pytest.raises((AttributeError, ValueError, NotImplementedError)):
                model.merge_and_unload(safe_merge=True)
        return
    merged = ran.adapter.merge(model)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert torch.allclose(logits(merged), ran.trained, atol=1e-5)


@every
def test_packed_is_unpacked(ran, table, batch, context):
    model, architecture = ran.model.eval(), describe(ran.model)
    packed = collate(table, [list(range(4))], pad_id=3)
    if ran.adapter.name in limits.CANNOT["train.packing=true"]:
        with pytest.raises(ConfigError, match="virtual tokens"):
            architecture.hidden_states(model, packed)
        return
    with torch.no_grad():
        apart = architecture.hidden_states(model, batch)[batch.sequence >= 0]
        joined = architecture.hidden_states(model, packed)[packed.sequence >= 0]
    assert torch.allclose(apart, joined, atol=1e-4)


@every
def test_recomputed_gradients_are_the_same(ran, loss):
    model = copy.deepcopy(ran.model).train()
    active = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        torch.manual_seed(1)
        return torch.autograd.grad(loss(model), active, allow_unused=True)

    kept = gradients()
    checkpoint_activations(model)
    if ran.adapter.name in limits.CANNOT["train.gradient_checkpointing=true"]:
        try:
            differs = not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(kept, gradients(), strict=True))
        except RuntimeError:
            differs = True
        assert differs
        return
    for before, after in zip(kept, gradients(), strict=True):
        assert before is after is None or torch.allclose(before, after, atol=1e-6)


@every
def test_resumed_is_uninterrupted(ran, fresh, context, train):
    """Another seed at the start must not matter: masks, indices and projections come from the checkpoint."""
    model, adapter = fresh(), build(ran.adapter.name)
    seed = 0 if ran.adapter.changes_trainable else 5  # the layers that it draws follow from the seed of the run
    model, optimizer = begin(adapter, model, context(model, seed=seed))
    named = {n: p for n, p in model.named_parameters() if n in ran.named}
    assert named.keys() == ran.named.keys()
    checkpoint.load(ran.halfway, named, optimizer, adapter)
    train(adapter, model, count=2, optimizer=optimizer, first=2)
    assert [n for n, p in named.items() if not torch.equal(p, ran.named[n])] == []


@every_type
def test_goes_on_from_what_was_saved_or_refuses(ran, fresh, context, logits, tmp_path, train):
    ran.adapter.save(ran.model, tmp_path)
    model, adapter = fresh(), build(ran.adapter.name)
    if ran.adapter.name in limits.CANNOT["run=RUN"]:
        with pytest.raises(ConfigError, match=ran.adapter.name):
            adapter.go_on(model, context(model), tmp_path)
        return
    model = adapter.go_on(model, context(model, seed=3), tmp_path)
    assert torch.allclose(logits(model), ran.trained, atol=1e-5)
    with adapter.disabled(model):
        assert torch.allclose(logits(model), ran.trained, atol=1e-5)
    train(adapter, model, count=1)
    assert not torch.allclose(logits(model), ran.trained, atol=1e-6)


def packed(tiny_dir, quant) -> nn.Module:
    """The tiny model with quantised weights, as a run loads it."""
    component = registry.build("quant", quant)
    return component.prepare(load_bundle(ModelConfig(path=str(tiny_dir)), task="causal", quant=component).model)


@pytest.fixture(scope="module")
def unpacked(tiny_dir):
    """The tiny model in float32 with what its quantised weights stand for."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from ftrun.adapters.starts.loftq import dequantised

    made = {}
    for quant in QUANTS:
        plain = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
        for name, layer in packed(tiny_dir, quant).named_modules():
            if isinstance(layer, Linear4bit):
                value = dequantised(layer.weight)
            elif isinstance(layer, Linear8bitLt):
                scale = (
                    layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
                )  # it moves with the first product
                value = layer.weight.data.float() * scale.float()[:, None] / 127
            else:
                continue
            plain.get_submodule(name).weight.data = value.float().reshape(plain.get_submodule(name).weight.shape)
        made[quant] = plain
    return made


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", [*TYPES, "ia3", "lora", "prefix_tuning"])
def test_on_quantised_weights_it_does_what_it_does_on_their_values_or_refuses(
    name, quant, unpacked, tiny_dir, context, logits, train, tmp_path
):
    """Starts as that base, and the same trained adapter adds the same to it."""
    unable = name in limits.CANNOT[f"quant={quant}"]
    load = functools.partial(packed, tiny_dir, quant)
    try:
        wrong = off_on(quant, name, load, copy.deepcopy(unpacked[quant]), context, logits, train, tmp_path)
    except (RuntimeError, ValueError, TypeError, ConfigError):
        if unable:
            return
        raise
    assert bool(wrong) == unable, wrong


def off_on(quant, name, load, plain, context, logits, train, folder) -> str:
    """What is wrong with an adapter on quantised weights; empty where nothing is."""
    base, base_plain = logits(load()), logits(plain)
    adapter = build(name)
    on_plain = adapter.attach(plain, context(plain))
    starts = logits(on_plain) - base_plain
    train(adapter, on_plain, count=2, rate=3e-2)
    adapter.save(on_plain, folder)
    learnt = logits(on_plain) - base_plain
    here = build(name)
    model = load()
    on_packed = here.attach(model, context(model))
    near = ROUNDING[quant] * (1 + learnt.abs().max())
    if not torch.allclose(logits(on_packed) - base, starts, atol=near if name in NOT_THE_BASE else 1e-4):
        return "it starts as something else"
    train(here, on_packed.train(), count=1)
    loaded = build(name).load(load(), folder)
    if not torch.allclose(logits(loaded) - base, learnt, atol=near):
        return f"it adds something else: {(logits(loaded) - base - learnt).abs().max()} beyond {near}"
    return ""


# ---- what is refused ----


@pytest.mark.parametrize("setting", limits.WAYS_OUT)
def test_the_table_speaks_of_types_that_there_are(setting):
    assert limits.CANNOT.get(setting, {}).keys() <= set(NAMES)
    assert limits.cannot("a_type_of_tomorrow", setting)


def test_every_type_was_tried_or_left_out():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {str(kind.value).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert known == set(TYPES) | limits.HAND_WRITTEN | limits.LEFT_OUT.keys()
    assert set(TYPES) == limits.TRIED


def settings(quant="none", task="causal", **train):
    plain = {"gradient_checkpointing": False, "packing": None, "merge": False}
    return SimpleNamespace(
        choice=lambda slot: {"quant": quant}[slot],
        task=task,
        train=SimpleNamespace(**plain | train),
    )


@pytest.mark.parametrize(
    ("name", "given", "wrong"),
    [
        ("loha", {}, {"quant": "nf4"}),
        ("unilora", {}, {"quant": "int8"}),
        ("cartridge", {}, {"gradient_checkpointing": True}),
        ("prompt_tuning", {}, {"packing": True}),
        ("beft", {}, {"merge": True}),
        ("vera", {}, {"task": "classify"}),
        ("trainable_tokens", {"token_indices": []}, {}),
        ("oft", {"eps": 1.0}, {}),
        ("miss", {"mini_r": 2}, {}),
        ("tinylora", {"init_weights": False}, {}),
        ("vera", {"layers_pattern": "layers"}, {}),
        ("adalora", {"target_r": 12}, {}),
    ],
)
def test_refused_by_the_config_alone(name, given, wrong):
    with pytest.raises(ConfigError):
        registry.build("adapter", name, given).check(settings(**wrong))
    fine = {"token_indices": [5]} if name == "trainable_tokens" else {}
    registry.build("adapter", name, fine).check(settings())


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("vera", {"target_modules": ["q_proj", "nowhere"]}, "nowhere"),
        ("vera", {"exclude_modules": None, "modules_to_save": ["nowhere"]}, "nowhere"),
        ("lora", {"target_modules": "nowhere"}, "nowhere"),
        ("lora", {"rank_pattern": {"nowhere": 2}}, "nowhere"),
        ("lora", {"r": 65}, "adapter.r=65"),
        ("loha", {"r": 65}, "adapter.r=65"),
        ("lora", {"layers_to_transform": [2]}, "no layer 2"),
        ("lora", {"bias": "all"}, "no biases"),
        ("vera", {"bias": "vera_only"}, "no biases"),
        ("glora", {"r": 4, "config_C": "vector"}, "no biases"),
        ("trainable_tokens", {"token_indices": [384]}, "no token 384"),
        ("c3a", {"block_size": 5}, "adapter.block_size=5"),
        ("oft", {"oft_block_size": 5}, "oft_block_size"),
        ("vblora", {"vector_length": 5}, "adapter.vector_length=5"),
        ("boft", {"boft_n_butterfly_factor": 2}, "boft_n_butterfly_factor"),
        ("shira", {"r": 30}, "shira"),
        ("p_tuning", {"num_virtual_tokens": 4, "encoder_num_layers": 3}, "encoder_num_layers"),
        ("adalora", {"tinit": 3, "tfinal": 3}, "the run has 6"),
    ],
)
def test_refused_by_the_shape_of_the_model(name, given, words, loaded, context):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded.config)
    given = {knob: value for knob, value in given.items() if knob in registry.find("adapter", name).knobs}
    with pytest.raises(ConfigError) as caught:
        registry.build("adapter", name, given).attach(model, context(model))
    assert words in str(caught.value)
