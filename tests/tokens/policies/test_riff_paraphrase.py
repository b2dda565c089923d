"""Paraphrases that help a classifier: the paper's formulas in numpy, and the two stages on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

import ftrun
from ftrun.data.prepare import prepare
from ftrun.data.records import Message, Record
from ftrun.data.render import Renderer
from ftrun.errors import ConfigError, DataError
from ftrun.objectives.sft import Sft
from ftrun.select.trials.inner import InnerTraining
from ftrun.tokens import paraphraser as module
from ftrun.tokens.paraphraser import (
    DiverseBeams,
    Drafts,
    RewardedParaphrases,
    kl_penalty,
    log_likelihoods,
    mml_loss,
    z_scored,
)
from ftrun.tokens.policies import riff_paraphrase
from ftrun.tokens.policies.riff_paraphrase import RiffParaphrase
from ftrun.tokens.run import edit_rows
from ftrun.training.context import Context
from ftrun.training.loop import Trainer
from ftrun.training.view import StepView

SMALL: dict[str, Any] = {"m": 4, "steps": 3, "batch_size": 3, "max_new_tokens": 5, "learning_rate": 1e-2}


def small(**changes: Any) -> RiffParaphrase:
    return RiffParaphrase(**cast(Any, SMALL | changes))


@pytest.fixture(autouse=True)
def chatty(bundle, monkeypatch, tmp_path):
    """A model that says different things after different words, and caches of its own."""
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)


@pytest.fixture
def start(context, tmp_path):
    """``start(name)``: a context with a run folder of that name."""

    def make(name: str = "run") -> Context:
        return replace(context("riff_paraphrase"), out=tmp_path / name)

    return make


def labelled(count: int = 6) -> list[Record]:
    texts = [f"the {'quick' if i % 2 else 'lazy'} fox is {i} plus {i % 3}" for i in range(count)]
    return [Record(i, "labels", text=text, label="yes" if i % 2 else "no") for i, text in enumerate(texts)]


def chats(count: int = 6) -> list[Record]:
    return [
        Record(row.id, "sft", (Message("user", row.text), Message("assistant", str(row.label))))
        for row in labelled(count)
    ]


# ---- formulas ----


def draws(rows: int = 3, m: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    return random.normal(-20, 4, (rows, m)), random.normal(-2, 1, (rows, m)), random.normal(-20, 4, (rows, m))


def test_rewards_have_mean_0_and_sample_deviation_1():
    _, rewards, _ = draws()
    found = z_scored(torch.from_numpy(rewards).requires_grad_())
    assert not found.requires_grad
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(found.numpy().std(1, ddof=1), 1, rtol=1e-9)
    wanted = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-12)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_the_loss_is_that_of_the_paper():
    log_p, rewards, _ = draws()
    z = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-12)
    wanted = -np.log(np.exp(log_p + z).sum(1))
    np.testing.assert_allclose(mml_loss(torch.from_numpy(log_p), torch.from_numpy(rewards)), wanted, rtol=1e-9)


def test_its_gradient_is_the_share_of_each_paraphrase():
    log_p, rewards, _ = draws()
    z = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, ddof=1, keepdims=True)
    asked, given = torch.from_numpy(log_p).requires_grad_(), torch.from_numpy(rewards).requires_grad_()
    mml_loss(asked, given).sum().backward()
    share = np.exp(log_p + z)
    np.testing.assert_allclose(cast(Any, asked.grad), -share / share.sum(1, keepdims=True), rtol=1e-6)
    assert given.grad is None


@pytest.mark.parametrize("reward", [0.1, -7.3])
def test_equal_rewards_leave_the_likelihood_alone(reward):
    log_p, _, _ = draws()
    equal = torch.full(log_p.shape, reward, dtype=torch.float32)
    assert (z_scored(equal) == 0).all()
    np.testing.assert_allclose(mml_loss(torch.from_numpy(log_p), equal), -np.log(np.exp(log_p).sum(1)))


def test_the_penalty_holds_back_with_the_log_ratio():
    log_p, _, initial = draws()
    asked = torch.from_numpy(log_p).requires_grad_()
    penalty = kl_penalty(asked, torch.from_numpy(initial))
    np.testing.assert_allclose(penalty.detach(), ((log_p - initial + 1) * log_p).mean(1))
    penalty.sum().backward()
    np.testing.assert_allclose(cast(Any, asked.grad), (log_p - initial + 1) / log_p.shape[1])
    np.testing.assert_allclose(kl_penalty(asked, asked).detach(), log_p.mean(1))  # an untrained copy


def test_diverse_beams_pay_for_what_earlier_beams_took():
    random = np.random.default_rng(0)
    stop, groups, penalty = 0, 3, 0.7
    processor = DiverseBeams(groups, penalty, [stop])
    written = torch.ones((2 * groups, 1), dtype=torch.long)
    done = np.zeros((2, groups), bool)
    for _ in range(6):
        scores = random.normal(size=(2 * groups, 5))
        chosen = processor(written, torch.from_numpy(scores)).argmax(1)
        for row in range(2):
            taken = np.zeros(5)
            for group in range(groups):
                best = int((scores[row * groups + group] - penalty * taken).argmax())
                assert int(chosen[row * groups + group]) == best
                taken[best] += not done[row, group]
        written = torch.cat([written, chosen[:, None]], 1)
        done |= (chosen == stop).numpy().reshape(2, groups)
    assert done.any() and not done.all()


# ---- stage 1 ----


def test_samples_do_not_depend_on_the_batch(bundle):
    requests = [Renderer(bundle.tokenizer).prompt_ids(record) for record in chats(3)]
    drafts = Drafts(5, max_new_tokens=6)
    together = drafts.draw(bundle, requests, 4, 1)
    assert together == [drafts.draw(bundle, [request], 4, 1)[0] for request in requests]
    assert [len(group) for group in together] == [5, 5, 5]
    assert len({tuple(ids) for ids in together[0][:3]}) > 1  # samples
    assert len({tuple(ids) for ids in together[0][3:]}) == 2  # beams
    assert drafts.draw(bundle, requests, 5, 1)[0][:3] != together[0][:3]
    assert drafts.draw(bundle, requests, 5, 1)[0][3:] == together[0][3:]


def test_a_step_computes_the_papers_loss_and_reaches_the_adapter_only(bundle, start, monkeypatch):
    seen: list[dict[str, Any]] = []
    loss = RewardedParaphrases.loss
    draw = Drafts.draw

    def kept(self, view):
        drawn: list[Any] = []
        monkeypatch.setattr(Drafts, "draw", lambda *known: drawn.append(draw(*known)) or drawn[-1])
        if not seen:  # an adapter that says something
            with torch.no_grad():
                for name, parameter in view.model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(0, 0.2)
        found = loss(self, view)
        monkeypatch.setattr(Drafts, "draw", draw)
        examples = [self.examples[self.number_of[index]] for index in view.batch.table_index.tolist()]
        wanted, parts = plain_loss(view.model, self, examples, drawn[0])
        seen.append({"loss": float(found.value.detach()), "wanted": wanted, "ratio": parts})
        return found

    def plain_loss(model, objective, examples, groups):
        total, ratios = 0.0, []
        for example, group in zip(examples, groups, strict=True):
            log_p = np.array([likelihood(model, example.request, ids) for ids in group])
            with model.disable_adapter():
                first = np.array([likelihood(model, example.request, ids) for ids in group])
                texts = [module.text_of_ids(bundle, ids) for ids in group]
                answers = [answer(model, example.classified(text)) for text in [example.text, *texts]]
            r = np.array(answers[1:]) - answers[0]
            rz = (r - r.mean()) / (r.std(ddof=1) + 1e-12)
            total += -np.log(np.exp(log_p + rz).sum()) + objective.kl * ((log_p - first + 1) * log_p).mean()
            ratios.append(np.abs(log_p - first).max())
        return total, max(ratios)

    monkeypatch.setattr(RewardedParaphrases, "loss", kept)
    grads: list[dict[str, bool]] = []
    clip = Trainer._clip

    def looked(self):
        grads.append({name: p.grad is not None for name, p in self.bundle.model.named_parameters()})
        return clip(self)

    monkeypatch.setattr(Trainer, "_clip", looked)
    list(small().edit(labelled(), start()))
    assert len(seen) >= SMALL["steps"]
    for step in seen:
        assert step["loss"] == pytest.approx(step["wanted"], rel=1e-4)
        assert step["ratio"] > 0.01
    for step in grads:
        assert any(step.values())
        assert all(("lora_" in name) == has for name, has in step.items())


def likelihood(model, prompt: list[int], ids: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
    return float(sum(logits[len(prompt) + at - 1, token] for at, token in enumerate(ids)))


def answer(model, sequence) -> float:
    ids = sequence.input_ids.tolist()
    first = int(np.flatnonzero(sequence.loss_weight)[0])
    end = int(np.flatnonzero(sequence.loss_weight)[-1]) + 1
    return likelihood(model, ids[:first], ids[first:end])


def test_likelihoods_are_sums_over_tokens(bundle):
    pairs = [([5, 6, 7], [8, 9]), ([5, 6], [30, 31, 32, 33])]
    found = log_likelihoods(bundle, module.segments(pairs))
    np.testing.assert_allclose(found.detach(), [likelihood(bundle.model, *pair) for pair in pairs], rtol=1e-4)


def test_the_model_comes_back_as_it_was(bundle, start):
    before = {name: p.detach().clone() for name, p in bundle.model.named_parameters()}
    flags = {name: p.requires_grad for name, p in bundle.model.named_parameters()}
    list(small().edit(labelled(), start()))
    after = dict(bundle.model.named_parameters())
    assert after.keys() == before.keys() and {name: p.requires_grad for name, p in after.items()} == flags
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not bundle.model.training


def test_the_paraphraser_learns(start):
    untrained = list(small(steps=0).edit(labelled(), start("a")))
    trained = list(small().edit(labelled(), start("b")))
    assert texts(untrained) != texts(trained)


def texts(rows: list[dict[str, Any]]) -> dict[tuple[int, int], str]:
    return {(row["row"], row["paraphrase"]): row["messages"][0]["content"] for row in rows}


# ---- edited rows ----


def test_rows_are_followed_by_their_paraphrases(start):
    ctx = start()
    rows = list(small().edit(labelled(), ctx))
    assert [row["row"] for row in rows] == sorted(row["row"] for row in rows)
    for record in labelled():
        mine = [row for row in rows if row["row"] == record.id]
        assert mine[0]["messages"] == [
            {"role": "user", "content": f"{record.text}\nLabel:"},
            {"role": "assistant", "content": record.label},
        ]
        assert [row["paraphrase"] for row in mine] == list(range(len(mine)))
        assert all(row["messages"][-1]["content"] == record.label for row in mine)
        assert all(row["messages"][0]["content"].endswith("\nLabel:") for row in mine)
    assert not (ctx.out / "selection" / "token_shards").exists()


def test_the_order_of_the_rows_does_not_matter(start):
    wanted = texts(list(small().edit(chats(), start("a"))))
    assert texts(list(small().edit(chats()[::-1], start("b")))) == wanted


def test_another_model_may_paraphrase(bundle, start, monkeypatch):
    """A second copy of the run's own model writes what the own one writes."""
    wanted = texts(list(small().edit(chats(), start("a"))))
    bundle.model.save_pretrained(start("b").out / "copy")
    bundle.tokenizer.save_pretrained(start("b").out / "copy")
    policy = small(paraphraser=str(start("b").out / "copy"))
    loaded: list[Any] = []
    load = riff_paraphrase.load_bundle
    monkeypatch.setattr(riff_paraphrase, "load_bundle", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    assert texts(list(policy.edit(chats(), start("b")))) == wanted
    assert len(loaded) == 1 and loaded[0].model is not bundle.model


def test_the_same_paraphrases_are_made_once(start, monkeypatch):
    wanted = list(small().edit(labelled(), start("a")))
    monkeypatch.setattr(RiffParaphrase, "_made", None)
    assert list(small().edit(labelled(), start("b"))) == wanted


def test_a_killed_run_does_not_train_the_paraphraser_again(start, monkeypatch):
    wanted = list(small(kl=0.2).edit(labelled(), start("whole")))
    monkeypatch.setenv("FTRUN_CACHE", str(start("other").out))
    draw = Drafts.draw

    def killed(self, bundle, requests, step, seed):
        if step < 0:
            raise KeyboardInterrupt
        return draw(self, bundle, requests, step, seed)

    monkeypatch.setattr(Drafts, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        list(small(kl=0.2).edit(labelled(), start("killed")))
    monkeypatch.setattr(Drafts, "draw", draw)
    monkeypatch.setattr(Trainer, "_step", None)
    assert list(small(kl=0.2).edit(labelled(), start("killed"))) == wanted


def test_without_paraphrases_training_is_the_ordinary_one(start, monkeypatch):
    monkeypatch.setattr(InnerTraining, "run", None)
    rows = list(RiffParaphrase(m=0).edit(chats(), start()))
    assert [row["messages"] for row in rows] == [
        [{"role": turn.role, "content": turn.content} for turn in record.messages] for record in chats()
    ]
    assert {row["row_weight"] for row in rows} == {1.0}


def test_heldout_rows_get_no_paraphrase(start):
    rows = cast(Any, labelled())
    ctx = replace(start(), heldout=rows)
    edited = list(small().edit(rows, ctx))
    assert [row["row"] for row in edited] == list(range(6)) and {row["row_weight"] for row in edited} == {1.0}


def test_weights_are_half_for_the_text_and_half_for_its_paraphrases(start):
    found = [["a", "b", "c"], ["d", "", "e"], ["", "", ""], ["f", "f", "f"], ["g", "h", ""], ["i", "", ""]]
    rows = list(RiffParaphrase().weighted(labelled(), found))
    weights = {n: [row["row_weight"] for row in rows if row["row"] == n] for n in range(6)}
    assert np.mean([row["row_weight"] for row in rows]) == pytest.approx(1)
    scale = len(rows) / 6
    assert weights[0] == pytest.approx([scale / 2, *[scale / 6] * 3])
    assert weights[1] == pytest.approx([scale / 2, scale / 4, scale / 4])
    assert weights[2] == pytest.approx([scale])
    assert weights[3] == weights[0] and all(sum(group) == pytest.approx(scale) for group in weights.values())


def test_the_loss_of_stage_2_is_half_and_half(bundle, start, tmp_path, make_views):
    ctx = start()
    policy = small(steps=0)
    pool = edit_rows(policy, cast(Any, labelled()), ctx)
    knobs = {"context_length": 512, "vocab_size": len(bundle.tokenizer), "folder": tmp_path / "tokens"}
    table = prepare(pool, bundle.tokenizer, replace(ctx.settings.data, max_length=256), **knobs).table
    scores, weights = policy.precompute(table, ctx)
    trained = np.asarray(table.loss_weight) > 0
    assert (np.isnan(scores) == ~trained).all() and (weights[~trained] == 0).all() and (weights[trained] > 0).all()
    rows = [json.loads(line) for line in (ctx.out / "selection" / "edited.jsonl").read_text().splitlines()]
    total = 0.0
    for number in range(6):
        parts: dict[bool, list[float]] = {True: [], False: []}
        for index in range(len(table)):
            row = rows[int(table.record[index])]
            if row["row"] == number:
                parts[row["paraphrase"] == 0].append(-answer(bundle.model, table.sequence(index)))
        total += 0.5 * parts[True][0] + 0.5 * float(np.mean(parts[False]))
    tokens = trained.sum()
    views = make_views(table.with_weights(weights))
    loss = sum(float(Sft().loss(cast(StepView, view)).value.detach()) for view in views)
    assert sum(Sft().count(view.batch) for view in views) == tokens
    assert loss == pytest.approx(total * len(rows) / 6, rel=1e-4)


def test_a_pair_keeps_its_second_text():
    policy = RiffParaphrase(words={"1": "yes"})
    row = Record(0, "labels", text="a fox", text_pair="a dog", label=1)
    edited = list(policy.weighted([row], [["the fox"]]))
    assert [row["messages"][0]["content"] for row in edited] == ["a fox\na dog\nLabel:", "the fox\na dog\nLabel:"]
    assert edited[0]["messages"][1]["content"] == "yes"


def test_rows_without_a_user_turn_are_refused(start):
    row = Record(3, "sft", (Message("system", "a"), Message("assistant", "yes")))
    with pytest.raises(DataError, match="row 3 has no user turn"):
        list(RiffParaphrase().edit([row], start()))


def test_rows_without_room_are_refused(start):
    with pytest.raises(DataError, match="can attend to"):
        list(small(max_new_tokens=510).edit(labelled(), start()))


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tiny_dir, labels_file, tmp_path, monkeypatch):
    found = []
    for out, processes in (("one", 1), ("two", 2)):
        monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / f"cache-{out}"))
        words = ["recipe=riff_paraphrase", f"model.path={tiny_dir}", f"data.path={labels_file}", "eval=[]"]
        words += ["data.limit=8", "tokens.m=3", "tokens.steps=3", "tokens.batch_size=4", "tokens.max_new_tokens=6"]
        words += ["tokens.learning_rate=1e-2", "train.batch_size=4", "train.max_steps=2", "launch.threads=1"]
        words += [f"launch.processes={processes}", f"out={tmp_path / out}"]
        ftrun.run("train", overrides=words)
        edited = (tmp_path / out / "selection" / "edited.jsonl").read_text().splitlines()
        metrics = (tmp_path / out / "train" / "metrics.jsonl").read_text().splitlines()
        found.append(([json.loads(line) for line in edited], [json.loads(line)["loss"] for line in metrics]))
    assert texts(found[0][0]) == texts(found[1][0]) and len(found[0][1]) == 2
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)


@pytest.mark.parametrize(
    "knobs",
    [
        {"m": -1},
        {"m": 1},
        {"steps": -1},
        {"batch_size": 0},
        {"max_new_tokens": 0},
        {"kl": -0.1},
        {"kl": float("nan")},
        {"diversity": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"learning_rate": 0.0},
        {"template": "{label} {text}"},
        {"template": "{text}"},
    ],
)
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        RiffParaphrase(**knobs)
