"""One-token rollout: both forms against loops, DFT as a special case, and what a step may not depend on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ftrun
from ftrun.config.settings import ModelConfig
from ftrun.data.batches import micro_batches
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError
from ftrun.models import head
from ftrun.models.head import Head
from ftrun.models.load import load_bundle
from ftrun.objectives import otr
from ftrun.objectives.otr import Otr, draw_
from ftrun.objectives.sft import Sft
from ftrun.tokens.policies.dft import Dft
from ftrun.training.view import StepView


@pytest.fixture
def bundle(tiny_dir: Path):
    """Larger embeddings than a fresh model has: its predictions then differ from each other."""
    made = load_bundle(ModelConfig(path=str(tiny_dir)), task="causal")
    with torch.no_grad():
        made.model.get_input_embeddings().weight.mul_(20)
    return made


@pytest.fixture
def table() -> TokenTable:
    """Eight sequences; the fourth has two responses, the last no trained token."""
    random = np.random.default_rng(1)
    made = []
    for number in range(8):
        prompt, response = random.integers(2, 6), random.integers(3, 20)
        weight = np.concatenate([np.zeros(prompt), np.ones(response)]).astype(np.float32)
        if number == 3:
            weight[prompt + 1] = 0
        if number == 7:
            weight[:] = 0
        made.append(Sequence(random.integers(10, 300, prompt + response).astype(np.int32), weight, number))
    return TokenTable.from_sequences(made)


@pytest.fixture
def views(bundle, table):
    def make(batch_tokens: int = 10_000, packing: bool = False, step: int = 0) -> list[StepView]:
        batches = micro_batches(table, np.arange(len(table)), batch_tokens, packing, bundle.pad_id)
        return [StepView(bundle.model, bundle.architecture, batch, step=step) for batch in batches]

    return make


def mean_loss(objective, views: list[StepView]) -> float:
    total = sum(float(objective.loss(view).value.detach()) for view in views)
    return total / sum(objective.count(view.batch) for view in views)


def gradients(objective, views: list[StepView], bundle) -> list[torch.Tensor]:
    bundle.model.zero_grad()
    for view in views:  # one graph at a time, as in the loop
        (objective.loss(view).value / sum(objective.count(other.batch) for other in views)).backward()
    return [p.grad.clone() for p in bundle.model.parameters()]


def assert_close(one: list[torch.Tensor], two: list[torch.Tensor], rtol: float = 1e-4) -> None:
    for left, right in zip(one, two, strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=1e-6)


@pytest.fixture
def logits(bundle, table) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Logits at the trained tokens of every row and their gold ids, by a loop at batch size 1."""
    found = {}
    for row in range(len(table)):
        item = table.sequence(row)
        with torch.no_grad():
            raw = bundle.model(torch.tensor(item.input_ids.tolist())[None]).logits[0, :-1].double().numpy()
        asked = item.loss_weight[1:] > 0
        found[row] = raw[asked], item.input_ids[1:][asked]
    return found


def softmax(values: np.ndarray) -> np.ndarray:
    exp = np.exp(values - values.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def exact_losses(raw: np.ndarray, gold: np.ndarray, kappa: float, beta: float) -> list[float]:
    found = []
    for row, x in zip(raw, gold, strict=True):
        drawing, logp = softmax(row / kappa), np.log(softmax(row))
        wrong = sum(drawing[a] * logp[a] for a in range(len(row)) if a != x)
        found.append(-(drawing[x] * logp[x] + beta * wrong))
    return found


@pytest.mark.parametrize(("kappa", "beta"), [(1.0, 0.0), (1.3, -0.1), (2.0, 0.3)])
@pytest.mark.parametrize("average", ["sequence", "token"])
def test_exact_follows_the_formula(kappa, beta, average, views, logits):
    objective = Otr(rollouts="exact", temperature=kappa, beta=beta, average=average)
    rows = [exact_losses(*of, kappa, beta) for of in logits.values() if len(of[0])]
    wanted = np.mean([np.mean(row) for row in rows]) if average == "sequence" else np.mean(np.concatenate(rows))
    assert mean_loss(objective, views()) == pytest.approx(wanted, rel=1e-5)


def test_exact_without_temperature_and_penalty_is_dft(views, bundle):
    """Equal loss and equal gradient."""
    ours, theirs = Otr(rollouts="exact", temperature=1.0, beta=0.0, average="token"), views()
    for view in theirs:
        view.factors = Dft().weigh(view)
    assert mean_loss(ours, views()) == pytest.approx(mean_loss(Sft(), theirs), rel=1e-5)
    theirs = views()
    for view in theirs:
        view.factors = Dft().weigh(view)
    assert_close(gradients(ours, views(), bundle), gradients(Sft(), theirs, bundle))


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_without_temperature_the_penalty_only_scales_the_gradient(average, views, bundle):
    first, second = (
        gradients(Otr(rollouts="exact", temperature=1.0, beta=beta, average=average), views(), bundle)
        for beta in (-0.5, 0.25)
    )
    assert_close(first, [gradient * (1.5 / 0.75) for gradient in second])


def test_samples_average_out_to_exact(views, bundle):
    """Loss and gradient of many draws, and the share of gold ones."""
    many, exact = Otr(candidates=40_000, temperature=4.0), Otr(rollouts="exact", temperature=4.0)
    assert mean_loss(many, views()) == pytest.approx(mean_loss(exact, views()), rel=0.02)
    sampled, wanted = (torch.cat([g.flatten() for g in gradients(of, views(), bundle)]) for of in (many, exact))
    assert float((sampled - wanted).norm() / wanted.norm()) < 0.05
    shares = [float(of.loss(views()[0]).parts["gold_share"]) for of in (many, exact)]
    assert shares[0] == pytest.approx(shares[1], rel=0.04)


def test_samples_follow_the_formula(views, logits, bundle):
    """The same draws in plain loops, from the numbers that the objective draws with."""
    objective = Otr(candidates=7, temperature=1.7, beta=-0.2, average="token")
    (view,) = views()
    chances = objective._chances(view).double().numpy()
    rows = view.batch.table_index[view.batch.target_sequence].tolist()
    total, seen = 0.0, dict.fromkeys(range(8), 0)
    for row, chance in zip(rows, chances, strict=True):
        raw, x = logits[row][0][seen[row]], logits[row][1][seen[row]]
        seen[row] += 1
        below = np.cumsum(softmax(raw / 1.7))
        drawn = [int(np.argmax(below > c)) for c in chance]
        logp = np.log(softmax(raw))
        total += -sum((1.0 if a == x else -0.2) * logp[a] for a in drawn) / 7
    assert float(objective.loss(view).value) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("rollouts", ["sampled", "exact"])
def test_no_gradient_goes_through_the_draws(rollouts):
    """By each logit: pi times the sum of the rewards, minus the rewards of the word; in plain numpy."""
    objective = Otr(rollouts=rollouts, candidates=9, temperature=1.7, beta=-0.25)
    random = np.random.default_rng(4)
    raw, gold, chance = random.normal(0, 3, (6, 11)), random.integers(0, 11, 6), random.random((6, 9))
    raw[range(6), gold] = raw.max(1) + 0.5  # likely enough to be drawn
    reward = np.zeros_like(raw)  # mean reward that each word earns
    for n in range(6):
        if rollouts == "exact":
            reward[n] = -0.25 * softmax(raw[n] / 1.7)
            reward[n, gold[n]] /= -0.25
        else:
            below = np.cumsum(softmax(raw[n] / 1.7))
            for c in chance[n]:
                word = int(np.argmax(below > c))
                reward[n, word] += (1.0 if word == gold[n] else -0.25) / 9
    wanted = reward.sum(1, keepdims=True) * softmax(raw) - reward
    logits, ids = torch.from_numpy(raw.copy()), torch.from_numpy(gold)
    chances = torch.from_numpy(chance) if rollouts == "sampled" else None
    losses, _, _ = objective.losses_and_gradient_(logits, ids, chances, torch.empty_like(logits))
    np.testing.assert_allclose(logits.numpy(), wanted, atol=1e-12)
    np.testing.assert_allclose(losses.numpy(), -(reward * np.log(softmax(raw))).sum(1), atol=1e-12)


def test_a_gold_token_that_is_never_drawn_gives_no_gradient(views, bundle, monkeypatch):
    monkeypatch.setattr(otr, "draw_", lambda drawing, chances: torch.zeros(chances.shape, dtype=torch.long))
    found = gradients(Otr(beta=0.0, candidates=4), views(), bundle)
    assert not any(gradient.any() for gradient in found)


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([[0.0, 0.5, 0.2, 0.3], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    drawn = draw_(probabilities.clone(), torch.rand(3, 50_000, generator=torch.Generator().manual_seed(0)))
    shares = torch.stack([(drawn == word).float().mean(1) for word in range(4)], 1)
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=0.01)
    assert shares[probabilities == 0].max() == 0
    assert draw_(7 * probabilities, torch.tensor([[0.0], [0.0], [1.0]])).tolist() == [[1], [0], [3]]


@pytest.mark.parametrize("rollouts", ["sampled", "exact"])
@pytest.mark.parametrize("average", ["sequence", "token"])
def test_the_cut_and_the_chunks_do_not_matter(rollouts, average, views, bundle, monkeypatch):
    objective = Otr(rollouts=rollouts, average=average, candidates=16)
    whole = mean_loss(objective, views()), gradients(objective, views(), bundle)
    for batch_tokens, packing, room in ((1, False, 0), (60, True, 0), (10_000, True, 0), (10_000, False, 1 << 15)):
        if room:
            monkeypatch.setattr(head, "LOGITS_BYTES", room)
        assert mean_loss(objective, views(batch_tokens, packing)) == pytest.approx(whole[0], rel=1e-5)
        assert_close(gradients(objective, views(batch_tokens, packing), bundle), whole[1])


def test_every_step_and_seed_draws_anew(views, bundle):
    class Seeded:
        seed = 5

    objective = Otr(candidates=8)
    first, again, later = (mean_loss(objective, views(step=step)) for step in (0, 0, 1))
    assert first == again != later
    assert objective.attach(bundle, Seeded()) is None  # type: ignore[arg-type]
    assert mean_loss(objective, views()) != first


def test_weights_of_a_policy_count(views, table):
    for rollouts in ("sampled", "exact"):
        objective, (view,) = Otr(rollouts=rollouts, average="token", candidates=8), views()
        view.factors = torch.zeros(view.batch.trained_tokens)
        assert objective.loss(view).value == 0
        view.factors[5] = 2.0
        alone = float(objective.loss(view).value.detach())
        view.factors[5] = 1.0
        assert alone == pytest.approx(2 * float(objective.loss(view).value.detach())) != 0


@pytest.mark.parametrize("rollouts", ["sampled", "exact"])
def test_a_micro_batch_without_trained_tokens_has_no_loss(rollouts, views, bundle):
    empty = next(view for view in views(1) if view.batch.trained_tokens == 0)
    objective = Otr(rollouts=rollouts)
    loss = objective.loss(empty)
    assert loss.value == 0 and objective.count(empty.batch) == 0 and all(part == 0 for part in loss.parts.values())
    loss.value.backward()
    assert all(p.grad is None or not p.grad.any() for p in bundle.model.parameters())


@pytest.mark.parametrize("rollouts", ["sampled", "exact"])
@pytest.mark.parametrize("called", [False, True])
def test_logits_come_in_chunks(called, rollouts, views, bundle, monkeypatch):
    """No tensor as wide as the vocabulary holds more positions than the bound lets through, forward and backward."""
    words, width = bundle.model.config.vocab_size, bundle.model.config.hidden_size
    monkeypatch.setattr(head, "LOGITS_BYTES", 5 * 4 * (4 if called else 2) * words)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            wide = isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[1] == words
            if wide and len(result) != width:  # the head's weight, turned
                seen.append(len(result))
            return result

    (view,) = views()
    plain = view.architecture.head(view.model)
    if called:
        swap_head(view, Head(None, vocabulary=words, forward=plain.logits), monkeypatch)
    assert len(view.hidden) > 50
    with Watch():
        Otr(rollouts=rollouts, candidates=8).loss(view).value.backward()
    assert max(seen) == 5 and len(seen) > 10


def swap_head(view: StepView, new: Head, monkeypatch) -> None:
    monkeypatch.setattr(type(view.architecture), "head", lambda self, model: new)


@pytest.mark.parametrize("rollouts", ["sampled", "exact"])
@pytest.mark.parametrize(("bias", "scale", "cap"), [(False, 1.0, None), (True, 0.3, None), (True, 0.5, 2.0)])
@pytest.mark.parametrize("trains_head", [False, True])
def test_the_closed_gradient_is_that_of_autograd(rollouts, bias, scale, cap, trains_head, views, monkeypatch):
    """Loss, parts and gradients; with a head that is called only, autograd finds them."""
    (view,) = views()
    random = torch.Generator().manual_seed(3)
    words, width = view.architecture.head(view.model).vocabulary, view.hidden.shape[1]
    states = torch.randn(len(view.hidden), width, generator=random, dtype=torch.float64).requires_grad_()
    weight = torch.randn(words, width, generator=random, dtype=torch.float64).requires_grad_(trains_head)
    offset = torch.randn(words, generator=random, dtype=torch.float64).requires_grad_(trains_head) if bias else None
    view.__dict__["hidden"] = states  # in the place of the cached property
    view.factors = torch.rand(len(states), generator=random)
    monkeypatch.setattr(head, "LOGITS_BYTES", 7 * 8 * 2 * words)
    plain = Head(weight, offset, scale, cap, words)
    leaves = [leaf for leaf in (states, weight, offset) if leaf is not None and leaf.requires_grad]
    objective, found = Otr(rollouts=rollouts, candidates=16, beta=-0.3), []
    for one in (plain, Head(None, vocabulary=words, forward=plain.logits)):
        swap_head(view, one, monkeypatch)
        loss = objective.loss(view)
        found.append([loss.value, *loss.parts.values(), *torch.autograd.grad(3 * loss.value, leaves)])
    for ours, wanted in zip(*found, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(ours, wanted)
    with torch.no_grad():
        swap_head(view, plain, monkeypatch)
        torch.testing.assert_close(objective.loss(view).value, found[1][0])


def test_parts_are_the_plain_loss_and_the_share_of_gold(views, logits):
    parts = Otr(rollouts="exact", temperature=1.0, average="token").loss(views()[0]).parts
    gold = np.concatenate([softmax(raw)[range(len(ids)), ids] for raw, ids in logits.values() if len(ids)])
    assert float(parts["nll"]) == pytest.approx(-np.log(gold).sum(), rel=1e-5)
    assert float(parts["gold_share"]) == pytest.approx(gold.sum(), rel=1e-4)


@pytest.mark.parametrize("knobs", [{"candidates": 0}, {"temperature": 0.0}, {"beta": 1.0}, {"beta": float("nan")}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(ConfigError, match=f"objective.{next(iter(knobs))}"):
        Otr(**knobs)


# ---- through the loop ----


def words(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[str]:
    quick = ["eval=[]", "data.heldout=0", "data.max_length=256", "train.batch_size=8", "train.max_steps=3"]
    return ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *quick, *more]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train/metrics.jsonl").read_text().splitlines()]


def test_a_run_of_the_special_case_is_a_run_of_dft(tiny_dir, rows_file, tmp_path):
    special = ["rollouts=exact", "temperature=1", "beta=0", "average=token"]
    more = ["objective=otr", *(f"objective.{knob}" for knob in special)]
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "otr", *more))
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "dft", "tokens=dft"))
    np.testing.assert_allclose(losses(tmp_path / "otr"), losses(tmp_path / "dft"), rtol=1e-4)


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_cut(tiny_dir, rows_file, tmp_path):
    more = ("objective=otr", "tokens=talr", "adapter=lora")
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "whole", *more, "train.packing=false"))
    for cut in ("train.batch_tokens=1", "train.packing=true"):
        ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / cut, *more, cut))
        np.testing.assert_allclose(
            losses(tmp_path / "whole"), losses(tmp_path / cut), rtol=1e-5, atol=1e-5, err_msg=cut
        )


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny_dir, rows_file, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        more = ("objective=otr", "launch.threads=1", f"launch.processes={processes}")
        overrides = words(tiny_dir, rows_file, tmp_path / out, *more)
        ftrun.run("train", overrides=overrides)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5, atol=1e-5)
