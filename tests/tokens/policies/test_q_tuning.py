"""Q-tuning: its rule against plain loops, and what a step may not depend on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import ftrun
from ftrun.config.compose import load
from ftrun.data.batches import micro_batches
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError
from ftrun.models.head import Head, token_entropy
from ftrun.objectives.sft import Sft
from ftrun.tokens.policies.q_tuning import QTuning, choose
from ftrun.tokens.step_ranking import ranks
from ftrun.training.view import StepView

# ---- the rule, in plain Python ----


def linear_quantile(values: list[float], level: float) -> float:
    ordered = sorted(values)
    place = level * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def plain_choice(ppl: list[float], entropy: list[float], r_sample: float) -> tuple[set[int], set[int]]:
    n, low, high = len(ppl), 0.0, 0.49
    q2: set[int] = set()
    q4: set[int] = set()
    for _ in range(10):
        a = (low + high) / 2
        bounds = [linear_quantile(values, level) for values in (ppl, entropy) for level in (a, 1 - a)]
        q2 = {i for i in range(n) if ppl[i] > bounds[1] and entropy[i] <= bounds[2]}
        q4 = {i for i in range(n) if ppl[i] <= bounds[0] and entropy[i] > bounds[3]}
        kept = (len(q2) + len(q4)) / n
        if abs(kept - r_sample) < 0.01:
            break
        if kept < r_sample:
            low = a
        else:
            high = a
    wanted = max(1, round(r_sample * n))
    scaled = [[(v - min(vs)) / (max(vs) - min(vs)) if max(vs) > min(vs) else 0.0 for v in vs] for vs in (ppl, entropy)]
    rest = [i for i in range(n) if i not in q2 | q4]
    rest.sort(key=lambda i: (-max(scaled[0][i] - scaled[1][i], scaled[1][i] - scaled[0][i]), i))
    for i in rest[: max(0, wanted - len(q2) - len(q4))]:
        (q2 if scaled[0][i] >= scaled[1][i] else q4).add(i)
    return q2, q4


def plain_scores(nll: list[float | None], smoothing: float, edge: str) -> dict[int, float]:
    """Scores of the trained positions; ``nll[p]`` is None for a prompt token, position 0 has no loss."""
    found = {}
    for p in range(1, len(nll)):
        own = nll[p]
        if own is None:
            continue
        sides: list[float | None] = []
        for q in (p - 1, p + 1):
            inside = 0 < q < len(nll)
            loss = nll[q] if inside else None
            if loss is not None:
                sides.append(math.exp(loss))
            elif edge == "zero":
                sides.append(1.0 if inside else 0.0)
            else:
                sides.append(None)
        known = [side for side in sides if side is not None] or [math.exp(own)]
        total = sum(known[0] if side is None else side for side in sides)
        found[p] = (1 - smoothing) * math.exp(own) + smoothing * total
    return found


def plain_weights(losses, entropies, weights, policy: QTuning) -> dict[int, np.ndarray]:
    """Factor of every position of every row (0 where nothing is trained), from losses by row and position."""
    rows = [row for row in losses if any(w > 0 for w in weights[row][1:])]
    asked = {row: [p for p in range(1, len(weights[row])) if weights[row][p] > 0] for row in rows}
    ppl = [math.exp(sum(losses[row][p] for p in asked[row]) / len(asked[row])) for row in rows]
    entropy = [sum(entropies[row][p] for p in asked[row]) / len(asked[row]) for row in rows]
    q2, q4 = plain_choice(ppl, entropy, policy.r_sample)
    scores = {
        row: plain_scores(
            [losses[row][p] if p in asked[row] else None for p in range(len(weights[row]))],
            policy.smoothing,
            policy.edge,
        )
        for row in rows
    }
    sign = 1 if policy.keep == "low" else -1
    kept = {rows[i]: set(asked[rows[i]]) for i in q2 | q4}
    if policy.token_budget == "per_sample":
        for i in q2:
            row = rows[i]
            stay = sorted(asked[row], key=lambda p: (sign * scores[row][p], p))
            kept[row] = set(stay[: max(1, math.floor(policy.r_token * len(stay) + 1e-9))])
    elif policy.r_token != 1:
        everything = sum(len(weights[row]) - 1 for row in rows)
        target = round(everything * policy.r_sample * policy.r_token)
        excess = sum(len(weights[rows[i]]) - 1 for i in q2 | q4) - target
        pool = [(row, p) for i in sorted(q2) for row in [rows[i]] for p in asked[row]]
        pool.sort(key=lambda token: (-sign * scores[token[0]][token[1]], token))
        for row, p in pool[: max(0, excess)]:
            kept[row].remove(p)
    left, all_of_them = sum(map(len, kept.values())), sum(map(len, asked.values()))
    return {
        row: np.array([all_of_them / left if p in kept.get(row, ()) else 0.0 for p in range(len(weights[row]))])
        for row in losses
    }


# ---- the choice of samples ----


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("r_sample", [0.125, 0.25, 0.5, 0.9, 1.0])
def test_choice_follows_the_rule(seed, r_sample):
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 50))
    ppl = np.exp(random.normal(1, 1, n))
    entropy = random.normal(0, 1, n) + (0.7 * np.log(ppl) if seed % 2 else 0)  # they go together in real models
    q2, q4 = choose(ppl, entropy, r_sample)
    expected = plain_choice(ppl.tolist(), entropy.tolist(), r_sample)
    assert (set(np.flatnonzero(q2).tolist()), set(np.flatnonzero(q4).tolist())) == expected
    assert not (q2 & q4).any()
    assert (q2 | q4).sum() >= max(1, round(r_sample * n))


def test_equal_samples_are_filled_up_in_order():
    q2, q4 = choose(np.full(4, 2.0), np.full(4, 1.0), 0.5)
    assert q2.tolist() == [True, True, False, False] and not q4.any()


def test_quadrants_mean_what_they_say():
    """High loss and certain: Q2. Low loss and uncertain: Q4. Both high, both low: dropped."""
    ppl, entropy = np.array([9.0, 8.0, 1.0, 1.1, 9.1, 1.2]), np.array([0.1, 0.2, 5.0, 5.1, 5.2, 0.3])
    q2, q4 = choose(ppl, entropy, 4 / 6)
    assert np.flatnonzero(q2).tolist() == [0, 1] and np.flatnonzero(q4).tolist() == [2, 3]


def test_ranks_count_in_groups():
    group, values = np.array([1, 0, 1, 1, 0]), np.array([5.0, 2.0, 5.0, 1.0, 3.0])
    assert ranks(group, values).tolist() == [1, 0, 2, 0, 1]


@pytest.mark.parametrize("knobs", [{"r_sample": 0}, {"r_token": 1.5}, {"smoothing": 1.5}, {"smoothing": -0.1}])
def test_shares_are_shares(knobs):
    with pytest.raises(ConfigError, match=r"share above 0|between 0 and 1"):
        QTuning(**knobs)


@pytest.mark.parametrize("objective", ["dpo", "classify"])
def test_only_token_losses_can_be_pruned(objective):
    with pytest.raises(ConfigError, match="mean over tokens"):
        load([f"objective={objective}", "tokens=q_tuning"])


# ---- inside a step ----


@pytest.fixture
def sequences() -> TokenTable:
    """Fourteen sequences; the first has two responses, the last trains on nothing, one trains from its second token on."""
    random = np.random.default_rng(3)
    made = []
    for number in range(14):
        prompt, response = random.integers(2, 9), random.integers(1, 24)
        weight = np.concatenate([np.zeros(prompt), np.ones(response)]).astype(np.float32)
        if number == 0:
            weight = np.array([0, 0, 1, 1, 1, 0, 0, 1, 1, 0], np.float32)
        if number == 5:
            weight[:] = 1
        if number == 13:
            weight[:] = 0
        made.append(Sequence(random.integers(10, 300, len(weight)).astype(np.int32), weight, number))
    return TokenTable.from_sequences(made)


@pytest.fixture
def sharp(bundle):
    """Larger embeddings than a fresh model has: its predictions then differ from each other."""
    with torch.no_grad():
        bundle.model.get_input_embeddings().weight.mul_(40)
    return bundle


@pytest.fixture
def views(sharp, sequences):
    def make(batch_tokens: int = 60, packing: bool = False, order=None) -> list[StepView]:
        drawn = np.arange(len(sequences)) if order is None else np.array(order)
        batches = micro_batches(sequences, drawn, batch_tokens, packing, sharp.pad_id)
        return [StepView(sharp.model, sharp.architecture, batch) for batch in batches]

    return make


@pytest.fixture
def known(sharp, sequences):
    """Loss and entropy at every position of every row, at batch size 1 in float64."""
    losses, entropies, weights = {}, {}, {}
    for row in range(len(sequences)):
        item = sequences.sequence(row)
        ids = torch.tensor(item.input_ids.tolist())
        with torch.no_grad():
            logp = torch.log_softmax(sharp.model(ids[None]).logits[0, :-1].double(), -1)
        losses[row] = [0.0, *(-logp[range(len(ids) - 1), ids[1:]]).tolist()]
        entropies[row] = [0.0, *(-(logp.exp() * logp).sum(-1)).tolist()]
        weights[row] = item.loss_weight.tolist()
    return losses, entropies, weights


def step(policy: QTuning, views: list[StepView]) -> dict[int, np.ndarray]:
    """Factors of the trained tokens of every row, as the loop gets them."""
    everything = torch.cat([policy.statistic(view) for view in views])
    assert not everything.requires_grad
    factors = {}
    for view in views:
        view.step_statistics = everything
        weighed = policy.weigh(view)
        assert not weighed.requires_grad and weighed.dtype == view.token_nll.dtype
        for number, row in enumerate(view.batch.table_index.tolist()):
            factors[row] = weighed[view.batch.target_sequence == number].numpy()
    return factors


POLICIES = [
    {"r_sample": r_sample, "r_token": r_token, "token_budget": budget, **more}
    for budget in ("per_sample", "batch")
    for r_sample, r_token, more in [
        (0.5, 0.7, {}),
        (0.25, 0.5, {"keep": "high"}),
        (0.9, 0.6, {"edge": "copy"}),
        (0.9, 0.3, {"smoothing": 0.0}),
        (1.0, 0.5, {"edge": "copy", "smoothing": 1.0}),
        (0.3, 1.0, {}),
    ]
]


@pytest.mark.parametrize("knobs", POLICIES)
def test_factors_follow_the_rule(knobs, views, known):
    policy = QTuning(**knobs)
    expected = plain_weights(*known, policy)
    for row, factors in step(policy, views()).items():
        asked = [p for p in range(1, len(known[2][row])) if known[2][row][p] > 0]
        np.testing.assert_allclose(factors, expected[row][asked], rtol=1e-6)


@pytest.mark.parametrize("knobs", POLICIES)
def test_the_cut_and_the_order_do_not_matter(knobs, views, sequences):
    whole = step(QTuning(**knobs), views(10_000))
    order = np.random.default_rng(0).permutation(len(sequences))
    for other in (views(1), views(60, packing=True), views(10_000, packing=True), views(60, order=order)):
        cut = step(QTuning(**knobs), other)
        for row in whole:
            np.testing.assert_allclose(whole[row], cut[row], rtol=1e-6)


@pytest.mark.parametrize("budget", ["per_sample", "batch"])
def test_keeping_everything_is_plain_training(budget, views):
    factors = step(QTuning(r_sample=1, r_token=1, token_budget=budget), views())
    assert all((values == 1).all() for values in factors.values())


def test_whole_samples_pruned_samples_and_dropped_ones(views, known):
    policy = QTuning(r_sample=0.5, r_token=0.5)
    factors = step(policy, views())
    kept = {row: int((values > 0).sum()) for row, values in factors.items()}
    # one row of fourteen has nothing to keep, and the last level tried may keep one sample too many
    assert sum(count > 0 for count in kept.values()) in (round(0.5 * 13), round(0.5 * 13) + 1)
    shares = {row: (kept[row], len(values)) for row, values in factors.items() if kept[row]}
    assert all(count in (total, max(1, total // 2)) for count, total in shares.values())
    assert any(count < total for count, total in shares.values())


def test_loss_is_the_mean_over_kept_tokens(views):
    made = views()
    factors = step(QTuning(), made)
    value = count = 0.0
    for view in made:
        view.factors = QTuning().weigh(view)
        value += float(Sft().loss(view).value.detach())
        count += Sft().count(view.batch)
    kept = torch.cat([view.token_nll.detach()[view.factors > 0] for view in made])
    assert value / count == pytest.approx(float(kept.mean()), rel=1e-5)
    assert len(kept) == sum(int((values > 0).sum()) for values in factors.values())


def test_a_micro_batch_without_kept_tokens_has_no_loss_and_no_gradient(views, sharp):
    made = views(1)
    step(QTuning(r_sample=0.25), made)
    empty = [view for view in made if not QTuning(r_sample=0.25).weigh(view).any() and view.batch.trained_tokens]
    assert empty
    for view in empty:
        view.factors = QTuning(r_sample=0.25).weigh(view)
        loss = Sft().loss(view).value
        assert loss == 0
        loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in sharp.model.parameters())


def test_copies_of_a_row_share_its_fate(views, known):
    """Two copies count as one sample, and as twice the tokens."""
    once, twice = step(QTuning(), views()), step(QTuning(), views(order=[*range(14), 2, 7]))
    for row in once:
        assert ((once[row] > 0) == (twice[row] > 0)).all()
    tokens = sum(len(values) for values in once.values()) + len(once[2]) + len(once[7])
    left = sum((values > 0).sum() for values in once.values()) + (once[2] > 0).sum() + (once[7] > 0).sum()
    factors = np.concatenate(list(twice.values()))
    np.testing.assert_allclose(factors[factors > 0], tokens / left, rtol=1e-6)


def test_entropy_of_many_positions_in_pieces(monkeypatch):
    from ftrun.models import head

    monkeypatch.setattr(head, "LOGITS_BYTES", 3 * 4 * 11 * 5)
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 8, generator=random) * 3, torch.randn(11, 8, generator=random)
    probabilities = (hidden @ weight.T).double().softmax(-1).numpy()
    expected = [-sum(p * math.log(p) for p in row) for row in probabilities]
    found = token_entropy(hidden.requires_grad_(), Head(weight, vocabulary=11))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)
    sure = Head(torch.tensor([[1e4], [0.0]]), vocabulary=2)
    assert token_entropy(torch.ones(1, 1), sure).tolist() == [0.0]
    assert token_entropy(torch.ones(0, 1), sure).shape == (0,)


# ---- through the loop ----

QUICK = [
    "eval=[]",
    "data.heldout=0",
    "data.max_length=256",
    "train.batch_size=8",
    "train.max_steps=3",
    "train.epochs=1",
]


def words(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[str]:
    return ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *QUICK, *more]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train/metrics.jsonl").read_text().splitlines()]


def test_a_run_that_keeps_everything_is_sft(tiny_dir, rows_file, tmp_path):
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "sft"))
    more = ("tokens=q_tuning", "tokens.r_sample=1", "tokens.r_token=1")
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "q", *more))
    np.testing.assert_allclose(losses(tmp_path / "q"), losses(tmp_path / "sft"), rtol=1e-6)


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_cut(tiny_dir, rows_file, tmp_path):
    whole = ("tokens=q_tuning", "train.packing=false")
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "whole", *whole))
    for cut in ("train.batch_tokens=1", "train.packing=true", "train.batch_tokens=200"):
        ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / cut, "tokens=q_tuning", cut))
        np.testing.assert_allclose(
            losses(tmp_path / "whole"), losses(tmp_path / cut), rtol=1e-5, atol=1e-5, err_msg=cut
        )


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["per_sample", "batch"])
def test_two_processes_train_what_one_trains(budget, tiny_dir, rows_file, tmp_path):
    more = ("tokens=q_tuning", f"tokens.token_budget={budget}", "launch.threads=1")
    for out, processes in (("one", 1), ("two", 2)):
        overrides = words(tiny_dir, rows_file, tmp_path / out, *more, f"launch.processes={processes}")
        ftrun.run("train", overrides=overrides)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5, atol=1e-5)
