"""ssToken: its two scores against the model's own attention and plain arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import ftrun
from ftrun.adapters.peft_adapter import seeded
from ftrun.config.settings import ModelConfig
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.models.load import load_bundle
from ftrun.objectives.sft import Sft
from ftrun.tokens.policies.sstoken import SsToken, scaled
from ftrun.training.view import StepView

NAME = "history_nll"
CUTS = [{"batch_tokens": 1}, {"batch_tokens": 64}, {"batch_tokens": 64, "packing": True}]


@pytest.fixture
def turns(table) -> TokenTable:
    """The rows, and one of three rounds: only what stands before a token and carries no loss is its prompt."""
    weight = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0], np.float32)
    more = Sequence(np.arange(40, 40 + len(weight), dtype=np.int32), weight, 999)
    return TokenTable.from_sequences([*(table.sequence(row) for row in range(len(table))), more])


@pytest.fixture
def remembered(turns) -> TokenTable:
    """With a history that differs from what the model says."""
    history = np.random.default_rng(2).uniform(4, 8, len(turns.input_ids)).astype(np.float32)
    return turns.with_remembered({NAME: history})


def targets(table, row) -> np.ndarray:
    weight = np.array(table.sequence(row).loss_weight)
    weight[0] = 0
    return np.flatnonzero(weight > 0)


def plain_attention(model, table, layer) -> dict[int, np.ndarray]:
    """Attention of every trained token to the tokens without loss before it, by the model's own maps."""
    found = {}
    for row in range(len(table)):
        item = table.sequence(row)
        with torch.no_grad():
            maps = model(torch.tensor([item.input_ids.tolist()]), output_attentions=True).attentions
        heads = maps[layer][0].double().numpy()
        prompt = np.asarray(item.loss_weight) == 0
        found[row] = heads.mean(axis=0)[targets(table, row)][:, prompt].sum(axis=1)
    return found


def eager(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def watching(make_views, table, cut, layer=-1, step=9, steps=10) -> list[StepView]:
    return make_views(table, **cut, watched_layer=layer, step=step, steps=steps)


def prompts(view: StepView) -> torch.Tensor:
    return (view.batch.sequence >= 0) & ~(view.batch.loss_weight > 0)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("layer", [0, -1])
def test_attention_is_the_models_own(cut, layer, turns, make_views, tiny_dir):
    expected = plain_attention(eager(tiny_dir), turns, layer)
    for view in watching(make_views, turns, cut, layer):
        found = view.attention_to(prompts(view))
        assert not found.requires_grad and view.token_nll.requires_grad
        for number, row in enumerate(view.batch.table_index.tolist()):
            mine = found[view.batch.target_sequence == number].numpy()
            np.testing.assert_allclose(mine, expected[row], rtol=1e-4, atol=1e-6)


def small(family: str):
    """A random model of another family: fewer key heads, norms of queries, a window, learned positions, partial rotation."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    knobs = {
        "qwen3": {**shape, "num_key_value_heads": 2, "head_dim": 16},
        "mistral": {**shape, "num_key_value_heads": 1, "sliding_window": 6},
        "gpt_neox": {**shape, "rotary_pct": 0.25},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    }[family]
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, vocab_size=384, attn_implementation="eager", **knobs)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gpt_neox", "gpt2"])
def test_attention_of_other_families(family, turns, tiny_dir, tmp_path, bundle):
    from ftrun.data.batches import micro_batches

    model = small(family)
    model.save_pretrained(tmp_path / family)
    bundle.tokenizer.save_pretrained(tmp_path / family)
    loaded = load_bundle(ModelConfig(path=str(tmp_path / family)), task="causal")
    expected = plain_attention(model, turns, -1)
    for batch in micro_batches(turns, np.arange(len(turns)), 64, False, loaded.pad_id):
        view = StepView(loaded.model, loaded.architecture, batch, watched_layer=-1)
        found = view.attention_to(prompts(view))
        for number, row in enumerate(batch.table_index.tolist()):
            mine = found[batch.target_sequence == number].numpy()
            np.testing.assert_allclose(mine, expected[row], rtol=1e-4, atol=1e-6)


def test_the_model_stays_in_training_and_keeps_its_config(turns, make_views, bundle):
    bundle.model.train()
    (view,) = watching(make_views, turns, {"batch_tokens": 10_000})
    before = [layer.self_attn.config for layer in bundle.architecture.layers]
    view.attention_to(prompts(view))
    assert all(module.training for module in bundle.model.modules())
    assert [layer.self_attn.config for layer in bundle.architecture.layers] == before
    assert not any(layer.self_attn._forward_pre_hooks for layer in bundle.architecture.layers)
    view.token_nll.sum().backward()


def test_attention_of_an_adapted_model_is_that_of_the_adapted_model(turns, make_views, bundle, tiny_dir):
    """LoRA inside the watched layer counts, its dropout does not."""
    from peft import LoraConfig, get_peft_model

    with seeded(0):
        model = get_peft_model(bundle.model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
    merged = eager(tiny_dir)
    model.eval()
    with torch.no_grad():
        for name, module in merged.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                wrapped = model.get_submodule(f"base_model.model.model.layers.{name}")
                module.weight += wrapped.get_delta_weight("default")
    expected = plain_attention(merged, turns, -1)
    (view,) = watching(make_views, turns, {"batch_tokens": 10_000})
    view.model = model
    _ = view.hidden
    model.train()
    found = view.attention_to(prompts(view))
    for number, row in enumerate(view.batch.table_index.tolist()):
        np.testing.assert_allclose(found[view.batch.target_sequence == number], expected[row], rtol=1e-3, atol=1e-5)


# ---- the choice ----


def plain_choice(nll, history, attention, gamma, rho) -> np.ndarray:
    rel = history - nll
    score = gamma * (rel - rel.min()) / (rel.max() - rel.min() + 1e-8) + (1 - gamma) * attention
    kept = sorted(range(len(nll)), key=lambda i: (-score[i], i))[: math.ceil(rho * len(nll) - 1e-9)]
    return np.isin(np.arange(len(nll)), kept)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("gamma", "rho"), [(0.5, 0.6), (0.0, 0.3), (1.0, 0.8), (0.9, 0.05)])
def test_the_choice_follows_the_formula(cut, gamma, rho, remembered, make_views, factors_of, plain_losses, tiny_dir):
    losses, attention = plain_losses(remembered), plain_attention(eager(tiny_dir), remembered, -1)
    factors = factors_of(SsToken(gamma=gamma, rho=rho), watching(make_views, remembered, cut))
    n = sum(len(nll) for nll in losses.values())
    kept = sum(math.ceil(rho * len(nll) - 1e-9) for nll in losses.values())
    for row, nll in losses.items():
        history = remembered.remembered[NAME][remembered.offsets[row] + targets(remembered, row)]
        chosen = plain_choice(nll, history, attention[row], gamma, rho)
        np.testing.assert_allclose(factors[row], chosen * n / kept, rtol=1e-6)
        assert (factors[row] > 0).sum() == math.ceil(rho * len(nll) - 1e-9)


def test_the_loss_is_the_mean_over_kept_tokens(remembered, make_views, factors_of):
    views = watching(make_views, remembered, {"batch_tokens": 40})
    factors_of(SsToken(), views)
    value = sum(float(Sft().loss(view).value.detach()) for view in views)
    kept = torch.cat([view.token_nll.detach()[view.factors > 0] for view in views])
    assert value / sum(Sft().count(view.batch) for view in views) == pytest.approx(float(kept.mean()), rel=1e-5)


def test_everything_kept_is_plain_training(remembered, make_views, factors_of):
    factors = factors_of(SsToken(rho=1.0), watching(make_views, remembered, {}))
    assert all((values == 1).all() for values in factors.values())


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_one_score_alone(gamma, remembered, make_views, factors_of, monkeypatch):
    """gamma=0 does not look at losses, gamma=1 not at attention."""
    policy = SsToken(gamma=gamma, warmup_samples=0)
    expected = factors_of(policy, watching(make_views, remembered, {}))
    other = remembered.with_remembered({NAME: -remembered.remembered[NAME]})
    if gamma == 1:
        other = remembered
        assert policy.watched_layer() is None
        monkeypatch.setattr(StepView, "attention_to", lambda *_: pytest.fail("attention was asked for"))
    found = factors_of(policy, watching(make_views, other, {}, None if gamma else -1))
    assert all((found[row] == expected[row]).all() for row in expected)


def test_early_on_attention_decides_alone(remembered, make_views, factors_of):
    views = [watching(make_views, remembered, {}, step=step) for step in (0, 1, 2)]
    alone = factors_of(SsToken(gamma=0.0), views[0])
    found = [factors_of(SsToken(gamma=0.9, warmup_samples=0.2), view) for view in views]
    same = [all((one[row] == alone[row]).all() for row in alone) for one in found]
    assert same == [True, True, False]
    policy = SsToken(warmup_samples=100)
    policy._batch_size = 48
    assert [policy.warms_up(step, 1000) for step in (0, 2, 3)] == [True, True, False]


def test_scaled_to_the_group():
    values, group = torch.tensor([3.0, 1.0, 5.0, 5.0, 2.0]), torch.tensor([0, 0, 2, 2, 0])
    torch.testing.assert_close(scaled(values, group, 3), torch.tensor([1.0, 0.0, 0.0, 0.0, 0.5]))


@pytest.mark.parametrize("knobs", [{"rho": 0}, {"gamma": 1.1}, {"warmup_samples": -1}])
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        SsToken(**knobs)


def test_rows_without_prompts_are_refused_where_attention_counts(context):
    rows = [Sequence(np.arange(20, 26, dtype=np.int32), np.r_[0, np.ones(5)].astype(np.float32), i) for i in (0, 1)]
    plain = TokenTable.from_sequences(rows)
    with pytest.raises(DataError, match="no row has one"):
        SsToken().remember(plain, context())
    found = SsToken(gamma=1.0, warmup_samples=0).remember(plain, context())[NAME]
    assert np.isnan(found).tolist() == [True, *[False] * 5] * 2


def test_a_layer_that_is_not_there_is_refused_before_scoring(table, context):
    with pytest.raises(ConfigError, match="2 layers"):
        SsToken(layer=5).remember(table, context())


# ---- through the loop ----

QUICK = ["eval=[]", "data.heldout=0", "train.batch_size=8", "train.max_steps=3", "optim.learning_rate=1e-2"]
QUICK += ["schedule=constant"]  # a first step of rate 0 would leave nothing but rounding to rank by


def words(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[str]:
    start = ["recipe=sft", "tokens=sstoken", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}"]
    return [*start, *QUICK, *more]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_cut(tiny_dir, rows_file, tmp_path):
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "whole", "train.packing=false"))
    for cut in ("train.batch_tokens=1", "train.packing=true", "train.gradient_checkpointing=true"):
        ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / cut, cut))
        np.testing.assert_allclose(
            losses(tmp_path / "whole"), losses(tmp_path / cut), rtol=1e-5, atol=1e-5, err_msg=cut
        )


@pytest.mark.parametrize(
    ("more", "message"),
    [(["tokens.layer=2"], "2 layers"), (["adapter=prefix_tuning", "train.packing=false"], "virtual tokens")],
)
def test_what_cannot_be_read_is_refused(more, message, tiny_dir, rows_file, tmp_path):
    with pytest.raises(ConfigError, match=message):
        ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "a", *more))


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny_dir, rows_file, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        more = ("launch.threads=1", f"launch.processes={processes}")
        overrides = words(tiny_dir, rows_file, tmp_path / out, *more)
        ftrun.run("train", overrides=overrides)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5, atol=1e-5)
