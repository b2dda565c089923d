"""Quantised base weights: exact sizes, what stays whole, training on top, and which mixes are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ftrun import registry
from ftrun.config.capabilities import check_mix
from ftrun.errors import ComponentError, ConfigError
from ftrun.models.architecture import describe
from ftrun.models.checkpointing import checkpoint_activations

IDS = torch.arange(4, 44).reshape(2, 20)


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory):
    """A two-layer Llama whose matrices fill whole blocks of 64 and 256 * 64 weights."""
    folder = tmp_path_factory.mktemp("wide-llama")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def load(wide_dir):
    def loaded(quant="none", checkpointing=False, **knobs):
        component = registry.build("quant", quant, knobs)
        model = AutoModelForCausalLM.from_pretrained(
            wide_dir, dtype=torch.float32, **component.load_arguments(torch.float32)
        )
        prepared = component.prepare(model)
        if checkpointing:
            checkpoint_activations(prepared)
        return prepared

    return loaded


@pytest.fixture(scope="module")
def loadable_dir(wide_dir, tiny_dir):
    """The wide model as a whole folder, with a tokenizer."""
    for file in [*tiny_dir.glob("tokenizer*"), tiny_dir / "chat_template.jinja"]:
        (wide_dir / file.name).write_bytes(file.read_bytes())
    return wide_dir


def context(model):
    bundle = SimpleNamespace(model=model, tokenizer=None, architecture=describe(model))
    return SimpleNamespace(settings=SimpleNamespace(task="causal"), seed=0, bundle=bundle)


def attach(model, **knobs):
    adapter = registry.build("adapter", "lora", {"r": 4, "lora_alpha": 8} | knobs)
    return adapter, adapter.attach(model, context(model))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def train(model, steps=4):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in n}


# ---- sizes ----


def stored_bits(linear):
    state = linear.weight.quant_state
    total = (
        8 * linear.weight.numel() * linear.weight.element_size()
        + 8 * state.absmax.numel() * state.absmax.element_size()
    )
    if state.nested:
        total += 8 * state.state2.absmax.numel() * state.state2.absmax.element_size()
    return total / (state.shape[0] * state.shape[1])


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_nf4_bits_are_what_is_stored(load, double, bits):
    quant = registry.build("quant", "nf4", {"double_quant": double})
    assert quant.bits() == pytest.approx(bits, abs=5e-4)
    model = load("nf4", double_quant=double)
    assert stored_bits(model.model.layers[0].mlp.up_proj) == pytest.approx(quant.bits(), rel=1e-9)


def test_nf4_has_sixteen_levels_a_block_an_exact_zero_and_both_ends(load):
    from ftrun.adapters.starts.loftq import dequantised

    weight = dequantised(load("nf4", double_quant=False).model.layers[0].self_attn.q_proj.weight)
    whole = load().model.layers[0].self_attn.q_proj.weight.detach()
    blocks, originals = weight.reshape(-1, 64), whole.reshape(-1, 64)
    assert torch.allclose(blocks.abs().amax(1), originals.abs().amax(1), rtol=1e-6)
    levels = torch.unique((blocks / originals.abs().amax(1, keepdim=True)).round(decimals=4))
    assert len(levels) == 16 and 0.0 in levels and levels[0] == -1.0 and levels[-1] == 1.0


def test_plain_quant_changes_nothing(load):
    quant = registry.build("quant", "none")
    assert quant.bits() is None and quant.load_arguments(torch.float32) == {}
    assert all(p.requires_grad for p in load().parameters())


@pytest.mark.parametrize(("quant", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_every_linear_but_the_head_is_quantised(load, quant, kind):
    kinds = {name: type(module).__name__ for name, module in linears(load(quant)).items()}
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {kind} and len(kinds) == 14


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prepared_model_is_frozen(load, checkpointing):
    model = load("nf4", checkpointing)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.model.layers[0].gradient_checkpointing == checkpointing


# ---- packing for inference ----


@pytest.fixture(params=[False, True], ids=["avx2", "avx512bf16"])
def packed(request, monkeypatch):
    """What bitsandbytes packs while it believes in this processor; the packed product itself runs on few."""
    import bitsandbytes.nn.modules as modules

    seen = []

    def pack(weight, state):
        seen.append(weight)
        state.packing_format_for_cpu = True
        return weight, state

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: request.param)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", pack)
    layer = modules.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu").eval()
    assert layer.support_avx512bf16_for_cpu == request.param
    return seen


def lora_gradient(model):
    """Of all LoRA weights, flat; B is not zero, so that A has a gradient too."""
    _, wrapped = attach(model, target_modules="all-linear")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    wrapped.train()(input_ids=IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.flatten() for n, p in wrapped.named_parameters() if "lora_" in n])


@pytest.mark.parametrize("again", [False, True], ids=["loaded", "loaded again"])
def test_after_an_evaluation_gradients_are_those_of_the_dequantised_model(packed, again, loadable_dir):
    from ftrun.adapters.plain_weights import load_again
    from ftrun.adapters.starts.loftq import dequantised
    from ftrun.config.settings import ModelConfig
    from ftrun.models.load import load_bundle

    quant = registry.build("quant", "nf4")
    model = load_bundle(ModelConfig(path=str(loadable_dir)), task="causal", quant=quant).model
    model = load_again(model, loadable_dir) if again else model
    evaluated = logits(model)
    plain = AutoModelForCausalLM.from_pretrained(loadable_dir, dtype=torch.float32)
    with torch.no_grad():
        for name, linear in linears(plain).items():
            if name != "lm_head":
                linear.weight.copy_(dequantised(model.get_submodule(name).weight))
    assert torch.allclose(evaluated, logits(plain), atol=1e-4)
    found, expected = lora_gradient(quant.prepare(model)), lora_gradient(plain)
    assert torch.cosine_similarity(found, expected, dim=0) > 0.9999
    assert not packed


# ---- LoRA on top ----


@pytest.mark.parametrize(
    ("quant", "knobs"),
    [
        ("nf4", {}),
        ("nf4", {"use_dora": True}),
        ("nf4", {"use_rslora": True, "init_lora_weights": "gaussian"}),
        ("int8", {}),
        ("int8", {"use_rslora": True}),
    ],
)
def test_lora_starts_as_the_quantised_base_and_trains_alone(load, quant, knobs):
    expected = logits(load(quant))
    adapter, model = attach(load(quant), **knobs)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    losses = train(model)
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters())
    assert all(now[n].grad is None and torch.equal(now[n], value) for n, value in base.items())
    with adapter.disabled(model):
        assert torch.allclose(logits(model), expected, atol=1e-5)


def test_dora_on_int8_is_refused_on_a_cpu(load):
    with pytest.raises(ConfigError, match="8-bit"):
        attach(load("int8"), use_dora=True)


def test_trainable_count_is_rank_times_in_plus_out(load):
    _, model = attach(load("nf4"))
    shapes = [m.weight.shape for n, m in linears(load()).items() if n != "lm_head"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        4 * (out + wide) for out, wide in shapes
    )


def test_gradient_checkpointing_gives_the_same_gradients(load):
    gradients = []
    for checkpointing in (False, True):
        _, model = attach(load("nf4", checkpointing))
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_saved_adapter_loads_on_a_fresh_quantised_base(load, quant, tmp_path):
    adapter, model = attach(load(quant))
    train(model)
    adapter.save(model, tmp_path)
    again = registry.build("adapter", "lora", {}).load(load(quant), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_merging_into_quantised_weights_is_refused_and_the_full_base_works(load, tmp_path):
    adapter, model = attach(load("nf4"))
    train(model)
    with pytest.raises(ComponentError, match="round them again"):
        adapter.merge(model)
    adapter.save(model, tmp_path)
    whole = adapter.load(load(), tmp_path)
    before = logits(whole)
    assert torch.allclose(logits(adapter.merge(whole)), before, atol=1e-5)


def test_ia3_on_nf4(load):
    expected = logits(load("nf4"))
    model = load("nf4")
    adapter = registry.build("adapter", "ia3", {})
    model = adapter.attach(model, context(model))
    assert torch.allclose(logits(model), expected, atol=1e-5)
    losses = train(model)
    assert losses[-1] < losses[0]


# ---- LoftQ ----


def lora_weights(model, whole):
    """Per adapted linear: full weight, dequantised base, base plus adapter."""
    from ftrun.adapters.starts.loftq import dequantised

    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            base = dequantised(layer.get_base_layer().weight)
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            yield whole[name].weight, base, base + layer.scaling["default"] * b @ a


@torch.no_grad()
@pytest.mark.parametrize("knobs", [{}, {"lora_alpha": 3, "use_rslora": True}])
def test_loftq_is_nearer_to_the_full_weights_than_rounding_and_nearer_with_more_rounds(load, knobs):
    whole, plain = linears(load()), linears(load("nf4"))
    from ftrun.adapters.starts.loftq import dequantised

    rounding = sum((whole[n].weight - dequantised(m.weight)).norm() ** 2 for n, m in plain.items() if n != "lm_head")
    errors = []
    for rounds in (1, 4):
        _, model = attach(load("nf4"), init_lora_weights="loftq", loftq_iterations=rounds, **knobs)
        errors.append(sum((full - both).norm() ** 2 for full, _, both in lora_weights(model, whole)))
    assert errors[0] < 0.95 * rounding
    assert errors[1] < errors[0]


@torch.no_grad()
def test_one_loftq_round_keeps_the_quantised_base_and_fits_its_error_best(load):
    """The squared error left is the tail of the singular values of W - Q (Eckart-Young)."""
    whole, plain = linears(load()), linears(load("nf4"))
    from ftrun.adapters.starts.loftq import dequantised

    _, model = attach(load("nf4"), init_lora_weights="loftq")
    same = [dequantised(m.weight) for n, m in plain.items() if n != "lm_head"]
    for (full, base, both), expected in zip(lora_weights(model, whole), same, strict=True):
        assert torch.equal(base, expected)
        tail = torch.linalg.svdvals(full - base)[4:]
        assert (full - both).norm() == pytest.approx(tail.norm().item(), rel=1e-4)


@pytest.mark.parametrize("knobs", [{}, {"loftq_iterations": 3}, {"use_dora": True}])
def test_loftq_trains_is_saved_with_its_base_and_merges(load, knobs, tmp_path):
    """base/ and adapter/ together are the trained model, in full precision too."""
    adapter, model = attach(load("nf4"), init_lora_weights="loftq", **knobs)
    start = logits(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    trained = logits(model)
    with adapter.disabled(model):
        assert torch.equal(logits(model), start)
    assert torch.equal(logits(model), trained)
    adapter.save(model, tmp_path)
    whole = registry.build("adapter", "lora", {"init_lora_weights": "loftq"}).load(load(), tmp_path)
    assert torch.allclose(logits(whole), trained, atol=1e-4)
    assert torch.allclose(logits(adapter.merge(whole)), trained, atol=1e-4)
    quantised = registry.build("adapter", "lora", {"init_lora_weights": "loftq"}).load(load("nf4"), tmp_path)
    assert (logits(quantised) - trained).norm() < 0.02 * trained.norm()


def test_loftq_says_when_the_full_weights_are_gone(load):
    model = load("nf4")
    model.name_or_path = "/nowhere/at/all"
    with pytest.raises(ComponentError, match="full-precision"):
        attach(model, init_lora_weights="loftq")


# ---- impossible mixes ----


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("adapter", ["none", "lisa"])
def test_training_the_base_of_a_quantised_model_is_refused(adapter, quant):
    with pytest.raises(ConfigError) as caught:
        check_mix([registry.find("adapter", adapter), registry.find("quant", quant)])
    words = str(caught.value)
    assert f"quant={quant} freezes them in" in words
    assert "Use quant=none, or adapter=lora." in words


def test_lisa_on_nf4_reads_as_promised():
    with pytest.raises(ConfigError) as caught:
        check_mix([registry.find("adapter", "lisa"), registry.find("quant", "nf4")])
    assert caught.value.what == "adapter=lisa trains layers of the base weights; quant=nf4 freezes them in 4 bits"
