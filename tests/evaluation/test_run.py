"""What the runner writes, and what it leaves untouched."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ftrun.errors import ConfigError
from ftrun.evaluation.base import Evaluation, Evaluator, Metric
from ftrun.evaluation.evaluators.heldout import Heldout
from ftrun.evaluation.run import evaluate_all


@dataclass
class Probe(Evaluator):
    """Draws from every generator and gives metrics that JSON cannot say."""

    name = "probe"
    fails: bool = False

    def evaluate(self, bundle, ctx):
        assert not bundle.model.training and not torch.is_grad_enabled()
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        if self.fails:
            raise RuntimeError("broken")
        metrics = {"loss": Metric(math.nan, math.inf, 3, higher_is_better=False), "odd": Metric(1.0, None, 2, False)}
        return Evaluation(metrics, [{"id": 0, "score": math.nan}, {"id": 1, "output": "ü\u2028"}])


def strictly(text: str):
    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_files_of_the_contract(bundle, context, table):
    ctx = context(heldout_tokens=table)
    results = evaluate_all([Heldout(), Probe()], bundle, ctx)
    assert strictly((ctx.out / "eval/results.json").read_text()) == results
    assert list(results) == ["heldout", "probe"]
    assert all(set(metric) == {"value", "stderr", "n", "rows"} for metric in results["heldout"].values())
    assert {**results["probe"]["loss"], "rows": ""} == {"value": None, "stderr": None, "n": 3, "rows": ""}
    assert results["probe"]["odd"]["higher_is_better"] is False, "the name alone would suggest otherwise"
    lines = (ctx.out / "eval/predictions/heldout.jsonl").read_text().split("\n")
    assert len([strictly(line) for line in lines if line]) == 11
    rows = [strictly(line) for line in (ctx.out / "eval/predictions/probe.jsonl").read_text().split("\n") if line]
    assert rows == [{"id": 0, "score": None}, {"id": 1, "output": "ü\u2028"}]
    assert not list(ctx.out.rglob(".*")), "nothing half-written stays"


def test_before_goes_beside(bundle, context, table):
    ctx = context(heldout_tokens=table)
    evaluate_all([Heldout()], bundle, ctx, "before")
    assert (ctx.out / "eval/before.json").exists() and not (ctx.out / "eval/results.json").exists()
    assert (ctx.out / "eval/predictions/before/heldout.jsonl").exists()
    evaluate_all([Heldout()], bundle, ctx)
    assert (ctx.out / "eval/before.json").read_text() == (ctx.out / "eval/results.json").read_text()


def test_only_the_first_process_writes(bundle, context, alone):
    ctx = context(alone(1, 2))
    assert evaluate_all([Probe()], bundle, ctx)["probe"]["odd"]["value"] == 1.0
    assert not (ctx.out / "eval").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_generators_come_back(bundle, context, fails):
    bundle.model.train()
    frozen = bundle.model.model.layers[1]
    frozen.eval()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = (torch.rand(3).tolist(), random.random(), np.random.random())
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    try:
        if fails:
            with pytest.raises(RuntimeError, match="broken"):
                evaluate_all([Probe(fails=True)], bundle, context())
        else:
            evaluate_all([Probe()], bundle, context())
        assert bundle.model.training and bundle.model.model.layers[0].training
        assert not frozen.training and not frozen.mlp.training
        assert torch.is_grad_enabled()
        assert (torch.rand(3).tolist(), random.random(), np.random.random()) == expected
    finally:
        bundle.model.eval()


def test_an_evaluator_twice_is_refused(bundle, context):
    with pytest.raises(ConfigError, match="twice"):
        evaluate_all([Probe(), Probe()], bundle, context())
