"""What every optimiser must do, and what each computes."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from ftrun import registry
from ftrun.errors import ConfigError
from ftrun.optim.muon import orthogonalise

NAMES = sorted(registry.specs("optim"))
RATE = {"sgd": 0.02, "lion": 0.02, "adafactor": 0.02}
Named = list[tuple[str, nn.Parameter]]


def parameters(seed: int = 0) -> Named:
    """An embedding, a large and a small hidden matrix, and a vector."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed_tokens": (20, 8), "mlp.up": (96, 64), "mlp.down": (8, 12), "norm": (8,)}
    return [(name, nn.Parameter(torch.randn(*shape, generator=generator))) for name, shape in shapes.items()]


def build(name: str, named: Named, **knobs) -> torch.optim.Optimizer:
    return registry.build("optim", name, {"learning_rate": RATE.get(name, 0.02), **knobs}).build(named)


def quadratic(named: Named) -> torch.Tensor:
    return torch.stack([(p**2 * (1 + torch.arange(p.numel()).view_as(p) % 3)).sum() for _, p in named]).sum()


def run(optimizer: torch.optim.Optimizer, named: Named, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = quadratic(named)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_all_are_found():
    assert NAMES == ["adafactor", "adamw", "adamw_8bit", "lion", "muon", "paged_adamw", "sgd"]


@pytest.mark.parametrize("name", NAMES)
def test_thirty_steps_lower_the_loss(name):
    named = parameters()
    losses = run(build(name, named), named, 30)
    assert losses[-1] < 0.9 * losses[0]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_continues_bit_for_bit_from_plain_state(name):
    """The state goes through what a checkpoint can hold: one file of tensors, one of JSON."""
    named = parameters()
    optimizer = build(name, named, weight_decay=0.1)
    run(optimizer, named, 7)
    saved = [(key, nn.Parameter(p.detach().clone())) for key, p in named]
    state = optimizer.state_dict()
    tensors, plain = {}, {"param_groups": state["param_groups"], "state": {}}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                plain["state"].setdefault(str(index), {})[key] = value
    plain = json.loads(json.dumps(plain, allow_nan=False))
    stored = {key: value.clone() for key, value in tensors.items()}
    addresses = [value.data_ptr() for value in tensors.values()]
    assert len(set(addresses)) == len(addresses), "safetensors refuses tensors that share memory"

    run(optimizer, named, 5)
    again = build(name, saved, weight_decay=0.1)
    restored = {index: dict(plain["state"].get(str(index), {})) for index in state["state"]}
    for key, value in stored.items():
        index, entry = key.split(".", 1)
        restored[int(index)][entry] = value
    again.load_state_dict({"state": restored, "param_groups": plain["param_groups"]})
    run(again, saved, 5)
    for (key, expected), (_, found) in zip(named, saved, strict=True):
        assert torch.equal(expected, found), key


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_spares_vectors(name):
    moved = {}
    for decay in (0.0, 0.5):
        named = parameters()
        run(build(name, named, weight_decay=decay), named, 2)
        moved[decay] = {key: p.detach() for key, p in named}
    assert torch.equal(moved[0.0]["norm"], moved[0.5]["norm"])
    for key in ("embed_tokens", "mlp.up", "mlp.down"):
        assert not torch.equal(moved[0.0][key], moved[0.5][key])
        assert moved[0.5][key].norm() < moved[0.0][key].norm()


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_gradient_rests(name):
    """Also when it moved before: neither momentum nor weight decay may touch a layer that sleeps."""
    named = parameters()
    optimizer = build(name, named, weight_decay=0.1)
    run(optimizer, named, 3)
    asleep = {"mlp.up", "norm"}
    before = {key: p.detach().clone() for key, p in named}
    optimizer.zero_grad(set_to_none=True)
    quadratic([(key, p) for key, p in named if key not in asleep]).backward()
    optimizer.step()
    for key, p in named:
        assert torch.equal(p, before[key]) == (key in asleep), key


@pytest.mark.parametrize("name", NAMES)
def test_state_of_a_sleeping_layer_can_be_dropped(name):
    named = parameters()
    optimizer = build(name, named)
    run(optimizer, named, 3)
    optimizer.state.pop(named[1][1], None)
    losses = run(optimizer, named, 3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", [["norm"], ["mlp.up"], ["embed_tokens"]])
def test_one_kind_of_parameter_is_enough(name, kept):
    named = [(key, p) for key, p in parameters() if key in kept]
    optimizer = build(name, named)
    assert all(group["params"] for group in optimizer.param_groups)
    losses = run(optimizer, named, 5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_train_is_refused(name):
    with pytest.raises(ConfigError, match="nothing to train"):
        build(name, [])


@pytest.mark.parametrize("name", NAMES)
def test_the_step_follows_lr_of_every_group(name):
    named = parameters()
    optimizer = build(name, named, weight_decay=0.1)
    assert {group["lr"] for group in optimizer.param_groups} == {RATE.get(name, 0.02)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for _, p in named]
    run(optimizer, named, 2)
    assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))


@pytest.mark.parametrize(
    ("name", "knobs"), [(name, {}) for name in NAMES] + [("paged_adamw", {"bits": 8}), ("sgd", {"momentum": 0.0})]
)
def test_state_bytes_are_what_is_allocated(name, knobs):
    """Measured on one LoRA-like matrix of rank 8."""
    named: Named = [("mlp.lora_A", nn.Parameter(torch.randn(8, 1024)))]
    config = registry.build("optim", name, knobs)
    optimizer = config.build(named)
    run(optimizer, named, 1)
    entries = optimizer.state_dict()["state"].get(0, {})
    tensors = {key: value for key, value in entries.items() if isinstance(value, torch.Tensor)}
    used = sum(value.numel() * value.element_size() for key, value in tensors.items() if not key.startswith("qmap"))
    assert used / named[0][1].numel() == pytest.approx(config.state_bytes(), abs=0.01)


def test_bitsandbytes_and_torch_agree_on_adamw():
    results = []
    for name in ("adamw", "paged_adamw"):
        named = parameters()
        run(build(name, named, weight_decay=0.1), named, 20)
        results.append([p.detach() for _, p in named])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_adamw_8bit_stays_near_adamw():
    results = []
    for name in ("adamw", "adamw_8bit"):
        named = parameters()
        run(build(name, named), named, 20)
        results.append(torch.cat([p.detach().flatten() for _, p in named]))
    assert (results[0] - results[1]).abs().max() < 0.06
    assert not torch.equal(*results)


def test_lion_is_the_paper_s_update():
    named = [("mlp.up", nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(1))))]
    optimizer = build("lion", named, weight_decay=0.3)
    p, m = named[0][1].detach().clone(), torch.zeros(4, 3)
    for step in range(6):
        gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 + step))
        named[0][1].grad = gradient.clone()
        optimizer.step()
        p = (1 - 0.02 * 0.3) * p - 0.02 * torch.sign(0.9 * m + 0.1 * gradient)
        m = 0.99 * m + 0.01 * gradient
    torch.testing.assert_close(named[0][1].detach(), p)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ConfigError, match="momentum"):
        registry.build("optim", "sgd", {"momentum": 0.0, "nesterov": True})


@pytest.mark.parametrize("shape", [(32, 32), (8, 64), (64, 8)])
def test_orthogonalised_singular_values(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(*shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.3 and values.max() < 1.3
    if shape[0] != shape[1]:  # no singular value near zero to begin with
        assert values.min() > 0.6


@pytest.mark.parametrize("scale", ["match_adamw", "original"])
def test_muon_agrees_with_torch(scale):
    """torch's Muon iterates in bfloat16 and averages instead of summing its momentum: equal directions up to rounding."""
    theirs = parameters()[1:3]
    ours = copy.deepcopy(theirs)
    adjust = {"match_adamw": "match_rms_adamw", "original": "original"}[scale]
    reference = torch.optim.Muon([p for _, p in theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    optimizer = build("muon", ours, weight_decay=0.1, scale=scale)
    run(reference, theirs, 3)
    run(optimizer, ours, 3)
    for (_, a), (_, b), (_, start) in zip(ours, theirs, parameters()[1:3], strict=True):
        assert (a - b).norm() < 0.03 * (b - start).norm()


def test_muon_gives_embeddings_and_vectors_to_adamw():
    named = parameters()
    plain = copy.deepcopy(named)
    optimizer = build("muon", named, adamw_learning_rate=0.005)
    kinds = {id(p): group["muon"] for group in optimizer.param_groups for p in group["params"]}
    assert {key: kinds[id(p)] for key, p in named} == {
        "embed_tokens": False,
        "mlp.up": True,
        "mlp.down": True,
        "norm": False,
    }
    run(optimizer, named, 5)
    run(build("adamw", plain, learning_rate=0.005), plain, 5)
    for (key, p), (_, q) in zip(named, plain, strict=True):
        close = torch.allclose(p, q, atol=1e-6)
        assert close == (key in ("embed_tokens", "norm")), key


def test_muon_moves_as_far_as_adamw():
    """match_adamw: the root mean square of an update is about 0.2 to 0.4 of the learning rate, whatever the shape."""
    for shape in [(64, 64), (16, 128), (128, 16)]:
        named = [("mlp.up", nn.Parameter(torch.zeros(*shape)))]
        optimizer = build("muon", named)
        named[0][1].grad = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        rms = math.sqrt(named[0][1].detach().square().mean())
        assert 0.1 < rms / 0.02 < 0.3, shape
