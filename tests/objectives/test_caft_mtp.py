"""Heads that look ahead, against plain loops; what they may see; how they are trained and kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ftrun
from ftrun.config.compose import load
from ftrun.config.settings import ModelConfig
from ftrun.data.batches import micro_batches
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError
from ftrun.models.bundle import Bundle
from ftrun.models.load import load_bundle
from ftrun.objectives.caft_mtp import CaftMtp
from ftrun.objectives.heads.future_heads import FutureHeads, watched_layers
from ftrun.objectives.sft import Sft
from ftrun.training.view import StepView

pytestmark = pytest.mark.slow  # whole runs, one after the other

QUICK = ["eval=[]", "data.heldout=0", "data.max_length=256", "train.batch_size=4", "train.max_steps=4"]


@pytest.fixture
def bundle(tiny_dir: Path) -> Bundle:
    return load_bundle(ModelConfig(path=str(tiny_dir)), task="causal")


@pytest.fixture
def table() -> TokenTable:
    """Eight rows of a prompt and a response, of 4 to 20 tokens; one is too short for the last head."""
    random = np.random.default_rng(1)
    made = []
    for number in range(8):
        prompt, response = int(random.integers(2, 6)), int(random.integers(3, 15)) if number else 2
        weight = np.concatenate([np.zeros(prompt), np.ones(response)]).astype(np.float32)
        made.append(Sequence(random.integers(10, 300, len(weight)).astype(np.int32), weight, number))
    return TokenTable.from_sequences(made)


def ready(bundle: Bundle, **knobs: Any) -> CaftMtp:
    """An objective whose heads differ from each other, as trained ones do."""
    objective = CaftMtp(**knobs)
    objective.future = FutureHeads(bundle.architecture, objective.heads)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in objective.future.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return objective


def views(objective, bundle, table, batch_tokens=10_000, packing=False, step=0, steps=10) -> list[StepView]:
    batches = list(micro_batches(table, np.arange(len(table)), batch_tokens, packing, bundle.pad_id))
    counts: dict[str, float] = {}
    for batch in batches:
        for name, value in ({"loss": objective.count(batch)} | objective.counts(batch)).items():
            counts[name] = counts.get(name, 0.0) + value
    made = [StepView(bundle.model, bundle.architecture, batch, counts=counts) for batch in batches]
    for view in made:
        view.step, view.steps = step, steps
    return made


def step_loss(objective, made: list[StepView]) -> tuple[torch.Tensor, dict[str, float]]:
    found = [objective.loss(view) for view in made]
    count = sum(objective.count(view.batch) for view in made)
    parts = {name: sum(float(loss.parts[name].detach()) for loss in found) / count for name in found[0].parts}
    return torch.stack([loss.value for loss in found]).sum() / count, parts


def plain_losses(objective: CaftMtp, bundle: Bundle, table: TokenTable) -> list[float]:
    """Mean losses CE_0 .. CE_n, a row at a time, with a mask written by hand."""
    model: Any = bundle.model
    total = [[] for _ in range(objective.heads + 1)]
    for row in range(len(table)):
        item = table.sequence(row)
        ids = torch.tensor(item.input_ids.tolist())
        time = len(ids)
        with torch.no_grad():
            output = model.model(ids[None], output_hidden_states=True)
            given = output.last_hidden_state if objective.head_input == "final" else output.hidden_states[-2]
            positions = torch.arange(time)[None]
            mask = torch.full((time, time), -torch.inf).triu(1)[None, None]
            states = [output.last_hidden_state[0]]
            for layer in objective.future.layers:
                rotary = model.model.rotary_emb(given, positions)
                after = layer(given, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
                states.append((after[0] if isinstance(after, tuple) else after)[0])
            for i, state in enumerate(states):
                logp = torch.log_softmax(model.lm_head(state).double(), -1)
                total[i] += [
                    -float(logp[t, ids[t + 1 + i]]) for t in range(time - 1 - i) if item.loss_weight[t + 1 + i] > 0
                ]
    return [float(np.mean(values)) for values in total]


@pytest.mark.parametrize("head_input", ["final", "penultimate"])
def test_loss_follows_the_formula(head_input, bundle, table):
    objective = ready(bundle, weight=0.5, heads=3, head_input=head_input)
    expected = plain_losses(objective, bundle, table)
    loss, parts = step_loss(objective, views(objective, bundle, table, step=4, steps=10))
    for i, ce in enumerate(expected):
        assert parts[f"ce_{i}"] == pytest.approx(ce, rel=1e-4)
    s = math.sin(6 / 10 * math.pi / 2)
    by_hand = expected[0] + sum(0.5 * 0.8**i * s * expected[i] for i in (1, 2, 3))
    assert float(loss.detach()) == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("way", [{"batch_tokens": 1}, {"batch_tokens": 40}, {"packing": True}])
@pytest.mark.parametrize("head_input", ["final", "penultimate"])
def test_the_cut_and_packing_do_not_matter(way, head_input, bundle, table):
    objective = ready(bundle, weight=1.0, head_input=head_input)
    whole = step_loss(objective, views(objective, bundle, table))[1]
    assert step_loss(objective, views(objective, bundle, table, **way))[1] == pytest.approx(whole, rel=1e-5)


def test_weights_fall_from_head_to_head_and_over_the_run():
    objective = CaftMtp()
    assert objective.shape(0, 100) == 1 and objective.shape(100, 100) == 0
    assert [objective.shape(step, 10) for step in range(11)] == sorted(
        (objective.shape(step, 10) for step in range(11)), reverse=True
    )
    assert CaftMtp(weight_schedule="constant").shape(70, 100) == 1
    assert (objective.weight, objective.decay, objective.heads) == (0.01, 0.8, 4)


def test_weight_zero_is_plain_training(bundle, table):
    objective = ready(bundle, weight=0.0)
    loss, parts = step_loss(objective, views(objective, bundle, table))
    plain, _ = step_loss(Sft(), views(Sft(), bundle, table))
    assert torch.equal(loss, plain) and list(parts) == ["ce_0"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_head_sees_a_later_token_or_another_document(attention, tiny_dir, table):
    bundle = load_bundle(ModelConfig(path=str(tiny_dir), attention=attention), task="causal")
    objective = ready(bundle)

    def outputs(rows: TokenTable, packing: bool) -> list[torch.Tensor]:
        (view,) = views(objective, bundle, rows, packing=packing)
        with torch.no_grad(), watched_layers(bundle.architecture) as seen:
            states = view.states
            return [layer(states, **seen.call)[0] for layer in objective.future.layers]

    short = table.rows(np.arange(2, 3))
    before = outputs(short, False)
    changed = table.rows(np.arange(2, 3))
    changed.input_ids = changed.input_ids.copy()
    changed.input_ids[-2:] += 1
    for one, two in zip(before, outputs(changed, False), strict=True):
        torch.testing.assert_close(one[:-2], two[:-2], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(one[-2:], two[-2:])


def test_a_batch_too_short_for_any_head_has_no_such_loss(bundle):
    table = TokenTable.from_sequences([Sequence(np.array([5, 6, 7], np.int32), np.array([0, 1, 1], np.float32), 0)])
    objective = ready(bundle, weight=1.0)
    loss, parts = step_loss(objective, views(objective, bundle, table))
    assert torch.isfinite(loss) and parts["ce_2"] == parts["ce_4"] == 0 and parts["ce_1"] > 0


@pytest.mark.parametrize("batch_tokens", [10_000, 1])
def test_a_head_worse_than_chance_is_said_once(batch_tokens, bundle, monkeypatch):
    """However the step is cut; the loss that is named is a mean over the tokens of a micro-batch."""
    random, rows = np.random.default_rng(0), []
    for number in range(4):
        rows.append(Sequence(random.integers(10, 300, 70).astype(np.int32), np.ones(70, np.float32), number))
    table = TokenTable.from_sequences(rows)
    monkeypatch.setattr("ftrun.objectives.caft_mtp.math.log", lambda _: 5.0)
    for level, warned in ((4.0, 0), (6.0, 1)):
        objective = ready(bundle, weight=1.0, heads=1)
        said: list[str] = []
        objective._report = SimpleNamespace(warn=said.append)  # type: ignore[assignment]
        monkeypatch.setattr(
            "ftrun.objectives.heads.future_heads.token_nll", lambda states, *_, n=level: states[:, 0] * 0 + n
        )
        step_loss(objective, views(objective, bundle, table, batch_tokens))
        assert len(said) == warned
    assert "head 1 of caft_mtp has a loss of 6, chance has 5" in said[0]


def test_gradients_reach_the_model_through_frozen_heads(bundle, table):
    objective = ready(bundle, weight=1.0)
    objective.future.requires_grad_(False)
    bundle.model.requires_grad_(True)
    loss, _ = step_loss(objective, views(objective, bundle, table))
    plain, _ = step_loss(Sft(), views(Sft(), bundle, table))
    weight = next(iter(bundle.architecture.layers[0].parameters()))
    ours, theirs = (torch.autograd.grad(value, weight)[0] for value in (loss, plain))
    assert not torch.allclose(ours, theirs)
    assert all(parameter.grad is None for parameter in objective.future.parameters())


# ---- whole runs ----


def words(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[str]:
    return ["recipe=caft_mtp", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *QUICK, *more]


def train(*overrides: str) -> dict:
    return ftrun.run("train", overrides=list(overrides))


def metrics(out: Path, folder: str = "train") -> list[dict]:
    return [json.loads(line) for line in (out / folder / "metrics.jsonl").read_text().splitlines()]


def heads(out: Path, folder: str = "train/heads") -> dict[str, np.ndarray]:
    found = load_file(out / folder / "heads.safetensors")
    return {name: values.numpy().copy() for name, values in found.items()}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_heads_learn_first_and_are_not_exported(tiny_dir, rows_file, tmp_path):
    more = ["objective.heads_learning_rate=1e-2", "objective.heads_batch_size=4", "objective.task_epochs=3"]
    train(*words(tiny_dir, rows_file, tmp_path / "run", *more))
    lines = metrics(tmp_path / "run", "train/heads/task")
    assert lines[-1]["head_1"] < lines[0]["head_1"] and lines[-1]["step"] == 18
    base = load_file(tiny_dir / "model.safetensors")
    assert (
        base["model.layers.0.mlp.up_proj.weight"].shape == heads(tmp_path / "run")["layers.3.mlp.up_proj.weight"].shape
    )
    trained = load_file(tmp_path / "run/train/checkpoints/step-000004/trainable.safetensors")
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert all("lora" in name for name in [*trained, *saved])


def test_the_model_stays_as_it_was_while_the_heads_learn(tiny_dir, rows_file, tmp_path):
    train(*words(tiny_dir, rows_file, tmp_path / "a", "objective.weight=0", "adapter.lora_dropout=0"))
    text = words(tiny_dir, rows_file, tmp_path / "b")[1:]
    train("recipe=lora_sft", *text, "adapter.r=8", "adapter.lora_alpha=16", "adapter.lora_dropout=0",
          "adapter.target_modules=all-linear", "optim.learning_rate=1e-5", "schedule=linear", "schedule.warmup=50")  # fmt: skip
    ours, plain = ([line["loss"] for line in metrics(tmp_path / name)] for name in "ab")
    assert ours == plain


def test_heads_that_go_on_training_lie_in_the_checkpoints(tiny_dir, rows_file, tmp_path):
    train(
        *words(
            tiny_dir, rows_file, tmp_path / "run", "objective.finetune_heads=true", "objective.heads=2", "adapter=none"
        )
    )
    trained = load_file(tmp_path / "run/train/checkpoints/step-000004/trainable.safetensors")
    assert {name for name in trained if name.startswith("objective.layers.1.")}
    base, saved = load_file(tiny_dir / "model.safetensors"), load_file(tmp_path / "run/model/model.safetensors")
    assert base.keys() == saved.keys()


class Killed(BaseException):
    """Stands for SIGKILL inside the process: nothing catches it."""


@pytest.mark.parametrize("dies_at", [2, 8])
def test_resume_does_not_train_the_heads_again(dies_at, tiny_dir, rows_file, tmp_path, monkeypatch):
    """Killed while the heads learn (6 steps), or after; the outcome is the same to the bit."""
    from ftrun.training import loop

    more = ["objective.heads_batch_size=4", "train.save_steps=1", "objective.heads=2"]
    train(*words(tiny_dir, rows_file, tmp_path / "whole", *more))
    plain, steps = loop.Trainer._clip, []

    def dies(self):
        steps.append(1)
        if len(steps) == dies_at:
            raise Killed
        return plain(self)

    cut = words(tiny_dir, rows_file, tmp_path / "cut", *more)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Trainer, "_clip", dies)
        train(*cut)
    done = []
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_clip", lambda self: done.append(1) or plain(self))
        train(*[word for word in cut if not word.startswith("out=")], f"resume={tmp_path / 'cut'}")
    assert len(done) == 10 - (dies_at - 1)
    assert same(heads(tmp_path / "whole"), heads(tmp_path / "cut"))
    one, two = (
        load_file(tmp_path / name / "train/checkpoints/step-000004/trainable.safetensors") for name in ("whole", "cut")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_general_rows_are_learnt_once_for_all_runs(tiny_dir, rows_file, tmp_path, capsys):
    general = tmp_path / "general.jsonl"
    general.write_text(
        "".join(json.dumps({"instruction": f"what is {i}", "output": f"{i} yes"}) + "\n" for i in range(6))
    )
    more = [
        f"objective.general_data={general}",
        "objective.general_epochs=2",
        "objective.task_epochs=0",
        "objective.heads=2",
    ]
    train(*words(tiny_dir, rows_file, tmp_path / "a", *more))
    train(*words(tiny_dir, rows_file, tmp_path / "b", *more))
    assert "are reused" in capsys.readouterr().err
    assert same(heads(tmp_path / "a"), heads(tmp_path / "b"))
    assert [line["step"] for line in metrics(tmp_path / "a", "train/heads/general")] == [1, 2]
    assert not (tmp_path / "b/train/heads/general/metrics.jsonl").exists()
    train(*words(tiny_dir, rows_file, tmp_path / "c", f"objective.trained_heads={tmp_path / 'a'}", "objective.heads=2", "objective.task_epochs=0"))  # fmt: skip
    assert same(heads(tmp_path / "a"), heads(tmp_path / "c"))
    with pytest.raises(ConfigError, match="another number of heads"):
        train(*words(tiny_dir, rows_file, tmp_path / "d", f"objective.trained_heads={tmp_path / 'a'}"))


@pytest.mark.parametrize(
    "knobs", [{"heads": 0}, {"weight": -1.0}, {"decay": 0.0}, {"trained_heads": "a", "general_data": "b"}]
)
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        CaftMtp(**knobs)


def test_clashes_are_refused():
    with pytest.raises(ConfigError, match="freezes them in 4 bits"):
        load(["recipe=caft_mtp", "quant=nf4"])
    with pytest.raises(ConfigError, match="works inside the step"):
        CaftMtp().check(load(["recipe=caft_mtp", "tokens=talr"]).settings)
