"""What trains has float32 weights: updates are kept, and losses are those of float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import ftrun
from ftrun.config.settings import ModelConfig
from ftrun.errors import ConfigError
from ftrun.models.load import load_bundle
from ftrun.models.precision import mix, products_of, set_products, widen

METHODS = {
    "sft": ["recipe=sft"],
    "lora_sft": ["recipe=lora_sft", "adapter.target_modules=all-linear", "adapter.lora_dropout=0", "train.merge=true"],
    "lisa": ["recipe=lisa", "adapter.layers=1", "adapter.interval=3"],
}


def train(recipe: str, tiny_dir: Path, rows_file: Path, out: Path, dtype: str, *more: str) -> dict:
    overrides = [*METHODS[recipe], f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}"]
    overrides += [f"model.dtype={dtype}", "data.heldout=0.2", "train.batch_size=4", "train.max_steps=12"]
    return ftrun.run("train", overrides=[*overrides, *more])


def losses(out: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for file in folder.glob("*.safetensors") for tensor in load_file(file).values()}


@pytest.mark.parametrize("recipe", list(METHODS))
def test_twelve_steps_in_mixed_precision_are_those_of_float32(recipe, tiny_dir, rows_file, tmp_path):
    """Evaluation included; what is saved is float32 and gives the same held-out loss when it is loaded again."""
    rate = f"optim.learning_rate={1e-2 if recipe == 'lora_sft' else 1e-3}"
    whole = train(recipe, tiny_dir, rows_file, tmp_path / "float32", "float32", rate)
    mixed = train(recipe, tiny_dir, rows_file, tmp_path / "bfloat16", "bfloat16", rate)
    np.testing.assert_allclose(losses(tmp_path / "bfloat16"), losses(tmp_path / "float32"), rtol=0.02)
    assert losses(tmp_path / "float32")[-3:].mean() < 0.97 * losses(tmp_path / "float32")[:3].mean()
    heldout = mixed["metrics"]["heldout"]["loss"]
    assert heldout == pytest.approx(whole["metrics"]["heldout"]["loss"], rel=0.02)
    for kind in ("adapter", "model") if recipe == "lora_sft" else ("model",):
        assert dtypes(tmp_path / "bfloat16" / kind) == {torch.float32}
    assert dtypes(max((tmp_path / "bfloat16/train/checkpoints").glob("step-*"))) == {torch.float32}
    again = ftrun.run("eval", overrides=[f"run={tmp_path / 'bfloat16'}"])
    assert again["metrics"]["heldout"]["loss"] == pytest.approx(heldout, rel=1e-5)


def moved(base: Path, run: Path) -> float:
    """Share of the weights that a run has changed."""
    last = load_file(run / "model" / "model.safetensors")
    pairs = [
        (value.bfloat16().float(), last[name].float()) for name, value in load_file(base / "model.safetensors").items()
    ]
    return float(sum((one != two).sum() for one, two in pairs) / sum(one.numel() for one, _ in pairs))


def test_updates_below_the_digits_of_bfloat16_are_kept(tiny_dir, rows_file, tmp_path):
    """In pure bfloat16, asked for by name and warned of, most of them are lost."""
    more = ["optim.learning_rate=1e-6", "train.max_steps=2", "eval=[]"]
    train("sft", tiny_dir, rows_file, tmp_path / "mixed", "bfloat16", *more)
    assert moved(tiny_dir, tmp_path / "mixed") > 0.9
    train("sft", tiny_dir, rows_file, tmp_path / "pure", "bfloat16", *more, "train.pure_bfloat16=true")
    assert moved(tiny_dir, tmp_path / "pure") < 0.1
    assert "pure bfloat16" in (tmp_path / "pure" / "ftrun.log").read_text()
    assert dtypes(tmp_path / "pure" / "model") == {torch.bfloat16}


@pytest.mark.parametrize(
    ("dtype", "more", "what"),
    [
        ("float16", [], "gradients vanish in float16"),
        ("float32", ["train.pure_bfloat16=true"], "no effect"),
    ],
)
def test_what_cannot_work_is_refused(dtype, more, what, tiny_dir, rows_file, tmp_path):
    with pytest.raises(ConfigError, match=what):
        train("sft", tiny_dir, rows_file, tmp_path / "run", dtype, "eval=[]", *more)


def test_mixing_can_be_taken_back_and_leaves_class_and_gradients_right(tiny_dir):
    bundle = load_bundle(ModelConfig(path=str(tiny_dir), dtype="bfloat16"), task="causal")
    model, ids = bundle.model, torch.arange(4, 24)[None]
    plain, backbone = type(model), bundle.architecture.backbone
    mix(bundle)
    assert products_of(model) is None, "nothing is wider than the rest"
    widen(model.parameters())
    mix(bundle)
    mix(bundle)
    assert products_of(model) == torch.bfloat16 and type(model).__name__ == plain.__name__
    with torch.no_grad():  # a narrowed copy made here must not be used again below
        model(input_ids=ids)
    logits = model(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16
    logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    head = bundle.architecture.head(model)
    assert head.logits(torch.ones(2, 32)).dtype == torch.bfloat16
    assert isinstance(model, LlamaForCausalLM) and model.generate(
        input_ids=ids, min_new_tokens=2, max_new_tokens=2
    ).shape == (1, 22)
    set_products(model, backbone, None)
    assert type(model) is plain and model(input_ids=ids).logits.dtype == torch.float32


def test_an_inner_training_puts_the_dtypes_back(tiny_dir):
    from ftrun.select.trials.inner import _put_back

    bundle = load_bundle(ModelConfig(path=str(tiny_dir), dtype="bfloat16"), task="causal")
    before = {name: p.detach().clone() for name, p in bundle.model.named_parameters()}
    with _put_back(bundle.model, bundle.architecture.backbone, keep_weights=True):
        widen(bundle.model.parameters())
        mix(bundle)
        with torch.no_grad():
            for parameter in bundle.model.parameters():
                parameter += 1e-4
    after = dict(bundle.model.named_parameters())
    assert products_of(bundle.model) is None
    assert all(
        after[name].dtype == torch.bfloat16 and torch.equal(after[name], value) for name, value in before.items()
    )
