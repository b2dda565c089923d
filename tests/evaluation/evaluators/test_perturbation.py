"""Noise on the weights: what it adds, that it goes away to the bit, and who gets it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from ftrun.config import compose
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError
from ftrun.evaluation.evaluators.heldout import Heldout
from ftrun.evaluation.evaluators.perturbation import Perturbation, noise


def bits(bundle) -> dict[str, np.ndarray]:
    return {name: value.clone().numpy().view(np.int32) for name, value in bundle.model.state_dict().items()}


def test_no_noise_no_rise(bundle, context, table):
    found = Perturbation(sigmas=[0.0], seeds=2).evaluate(bundle, context(heldout_tokens=table))
    assert found.metrics["rise_0"].value == 0 and found.metrics["rise_0"].n == 2


def test_the_clean_loss_is_the_held_out_loss(bundle, context, table):
    ctx = context(heldout_tokens=table)
    clean = Perturbation(sigmas=[0.1], seeds=1).evaluate(bundle, ctx).metrics["loss"].value
    assert clean == pytest.approx(Heldout().evaluate(bundle, ctx).metrics["loss"].value, abs=1e-9)


def test_weights_come_back_to_the_bit_whatever_happens(bundle, context, table):
    before = bits(bundle)
    Perturbation(sigmas=[0.5], norms=True, embeddings=True, seeds=1).evaluate(bundle, context(heldout_tokens=table))
    parameters = Perturbation()._noisy(bundle)
    with pytest.raises(KeyError), noise(parameters, 1.0, (0, 0)):
        assert any((bits(bundle)[name] != values).any() for name, values in before.items())
        raise KeyError
    for name, values in bits(bundle).items():
        np.testing.assert_array_equal(values, before[name])


def test_the_noise_is_sigma_times_the_spread(bundle):
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    with noise(Perturbation()._noisy(bundle), 0.1, (0, 0)):
        after = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    with noise(Perturbation()._noisy(bundle), 0.2, (0, 0)):
        twice = bundle.model.model.layers[0].mlp.down_proj.weight.detach().clone()
    name = "model.layers.0.mlp.down_proj.weight"
    added = (after[name] - before[name]).numpy()
    assert added.std() == pytest.approx(0.1 * before[name].numpy().std(), rel=0.05)
    assert abs(added.mean()) < 0.01 * before[name].numpy().std()
    torch.testing.assert_close(twice - before[name], 2 * torch.tensor(added), rtol=1e-3, atol=1e-6)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"{linear.name}.weight" for linear in bundle.architecture.linears}


def test_norms_and_embeddings_get_noise_on_request(bundle):
    plain = set(Perturbation()._noisy(bundle))
    with_norms = set(Perturbation(norms=True)._noisy(bundle)) - plain
    assert with_norms == {name for name, p in bundle.model.named_parameters() if p.ndim == 1}
    assert set(Perturbation(embeddings=True)._noisy(bundle)) - plain == {"model.embed_tokens.weight"}


def test_the_initial_spread_is_the_config_s(bundle):
    spreads = {spread for _, spread in Perturbation(spread="initial")._noisy(bundle).values()}
    assert spreads == {bundle.model.config.initializer_range}


def test_more_noise_harms_more_and_every_seed_differs(bundle, context, table):
    found = Perturbation(sigmas=[0.01, 0.3], seeds=3).evaluate(bundle, context(heldout_tokens=table))
    rises = {name: metric.value for name, metric in found.metrics.items()}
    assert abs(rises["rise_0.01"]) < abs(rises["rise_0.3"])
    losses = [row["loss"] for row in found.predictions]
    assert len(losses) == 1 + 2 * 3 and len(set(losses)) == len(losses)
    mean = np.mean([row["rise"] for row in found.predictions if row["sigma"] == 0.3])
    assert rises["rise_0.3"] == pytest.approx(mean)


def test_every_process_finds_the_same_bits(bundle, context, table, alone):
    """The losses of three processes, each with its share of the batches, as one process has them."""
    evaluator = Perturbation(sigmas=[0.1], seeds=2, batch_tokens=64)
    reference = evaluator.evaluate(bundle, context(heldout_tokens=table))
    shares = []
    for rank in range(3):
        team = alone(rank, 3)
        evaluator.evaluate(bundle, context(team, heldout_tokens=table))
        shares.append(team.given)
    team = alone(1, 3, gathered=[list(parts) for parts in zip(*shares, strict=True)])
    found = evaluator.evaluate(bundle, context(team, heldout_tokens=table))
    assert found == reference


def test_an_adapter_stays_as_it_is(bundle):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(copy.deepcopy(bundle.model), LoraConfig(target_modules=["q_proj", "v_proj"]))
    names = set(Perturbation()._noisy(replace(bundle, model=wrapped)))
    assert names == set(Perturbation()._noisy(bundle))


def test_further_models_are_measured_on_the_same_rows_and_named(tiny_dir, bundle, context, table):
    from ftrun.models.load import load_bundle

    settings = compose.load([f"model.path={tiny_dir}", "model.dtype=float32"]).settings
    own = load_bundle(settings.model, task="causal")
    ctx = context(heldout_tokens=table)
    ctx.settings = settings
    found = Perturbation(sigmas=[0.1], seeds=1, models=[str(tiny_dir)]).evaluate(own, ctx)
    assert found.metrics["rise_0.1"].value == found.metrics[f"rise_0.1 of {tiny_dir}"].value
    assert {(row["model"], row["revision"]) for row in found.predictions} == {(str(tiny_dir), None)}
    assert {row["fingerprint"] for row in found.predictions} == {own.fingerprint}


def test_a_better_but_more_sensitive_model_is_said(bundle, context, table):
    from ftrun.evaluation.base import Metric

    evaluator = Perturbation(sigmas=[0.1], models=["@later"])
    ctx = context(heldout_tokens=table)
    values = {"loss": 2.0, "rise_0.1": 0.1, "loss of @later": 1.9, "rise_0.1 of @later": 0.2}
    evaluator._compare({name: Metric(value) for name, value in values.items()}, 1, ctx)
    assert "@later has a lower loss" in ctx.report.console.file.getvalue()


def test_what_cannot_be_measured_is_refused(bundle, context, table):
    with pytest.raises(ConfigError, match="at least 1"):
        Perturbation(seeds=0)
    for sigmas in ([], [-0.1], [0.1, 0.1], [0.1, float("nan")], [float("inf")]):
        with pytest.raises(ConfigError, match="different numbers"):
            Perturbation(sigmas=sigmas)
    with pytest.raises(ConfigError, match="no held-out token"):
        Perturbation().evaluate(bundle, context())
    empty = TokenTable.from_sequences([Sequence(np.full(9, 7, np.int32), np.zeros(9, np.float32), 0)])
    with pytest.raises(ConfigError, match="no held-out token"):
        Perturbation().evaluate(bundle, context(heldout_tokens=empty))


def test_quantised_weights_are_refused(bundle):
    with pytest.raises(ConfigError, match="adds noise to the base weights"):
        compose.load(["recipe=perturbation_sensitivity", "quant=nf4", "adapter=lora"])
