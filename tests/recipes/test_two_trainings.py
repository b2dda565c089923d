"""Recipes of two trainings: the second starts from what the first has made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import ftrun

pytestmark = pytest.mark.slow
QUICK = ["data.heldout=0.2", "data.max_length=128", "train.batch_size=4", "train.max_steps=4"]


def train(recipe: str, model: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    words = [f"recipe={recipe}", f"model.path={model}", f"data.path={data}", f"out={out}", *QUICK, *more]
    return ftrun.run("train", overrides=words)


def test_reasoningv_goes_on_from_the_merged_adapter(tiny_dir, rows_file, tmp_path):
    one, two = tmp_path / "knowledge", tmp_path / "reasoning"
    first = train("reasoningv_two_stage", tiny_dir, rows_file, one, "optim.learning_rate=1e-2")
    assert first["trainable_parameters"] < first["total_parameters"]
    ids = torch.arange(5, 45).view(2, 20)
    merged = AutoModelForCausalLM.from_pretrained(one / "model")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir), str(one / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(merged(ids).logits, AutoModelForCausalLM.from_pretrained(tiny_dir)(ids).logits)
    second = train("reasoningv_two_stage", one / "model", rows_file, two, "adapter=none", "optim.learning_rate=1e-5")
    assert second["trainable_parameters"] == second["total_parameters"] == first["total_parameters"]
    before = second["metrics"]["before"]["heldout"]["loss"]
    assert before == pytest.approx(first["metrics"]["heldout"]["loss"], abs=1e-5)
    assert before != pytest.approx(first["metrics"]["before"]["heldout"]["loss"], abs=1e-5)


def test_clinical_instructions_follow_the_texts(tiny_dir, text_file, rows_file, tmp_path):
    untouched = train("clinical_cpt_sft", tiny_dir, rows_file, tmp_path / "without")
    train("cpt", tiny_dir, text_file, tmp_path / "domain", "optim.learning_rate=1e-2")
    after = train("clinical_cpt_sft", tmp_path / "domain" / "model", rows_file, tmp_path / "instructions")
    assert (tmp_path / "instructions" / "model" / "model.safetensors").is_file()
    texts, none = (run["metrics"]["before"]["heldout"]["loss"] for run in (after, untouched))
    assert abs(texts - none) > 1e-3  # it starts from other weights than the base


def test_proofreading_starts_from_the_rewriting_model(tiny_dir, rows_file, tmp_path):
    """The two commands of the recipe: the loss before the second training is that of the merged first one."""
    words = ["train.merge=true", "optim.learning_rate=1e-2"]
    train("lora_sft", tiny_dir, rows_file, tmp_path / "rewrite", *words)
    quick = ["eval=[heldout]", "data.max_length=256", "train.eval_before=true"]
    losses, weights = [], []
    for name, model in (("after", tmp_path / "rewrite" / "model"), ("without", tiny_dir)):
        summary = train("gec_proofread", model, rows_file, tmp_path / name, *quick)
        losses.append(summary["metrics"]["before"]["heldout"]["loss"])
        weights.append(AutoModelForCausalLM.from_pretrained(model).state_dict())
    assert abs(losses[0] - losses[1]) > 1e-3
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    asked = (tmp_path / "after/selection/edited.jsonl").read_text()
    assert asked == (tmp_path / "without/selection/edited.jsonl").read_text(), "the seed fixes the errors"
    base = json.loads((tmp_path / "after/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "rewrite" / "model")
