"""MuToR: where registers stand, what they see and predict, and that nobody else notices them."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ftrun
from ftrun.data.batches import Batch, micro_batches
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError
from ftrun.objectives.sft import Sft
from ftrun.tokens.policies.mutor import Mutor
from ftrun.training.view import StepView


@pytest.fixture
def attached(bundle, context):
    def make(**knobs) -> Mutor:
        policy = Mutor(**knobs)
        policy.attach(bundle, context())
        with torch.no_grad():  # as if it had trained
            policy._register.vector.normal_(generator=torch.Generator().manual_seed(0))
        return policy

    return make


@pytest.fixture
def batches(bundle, table):
    """``table``'s last sequence has two answers, one of a single token."""

    def make(batch_tokens: int = 60, packing: bool = False, of: TokenTable = table) -> list[Batch]:
        return list(micro_batches(of, np.arange(len(of)), batch_tokens, packing, bundle.pad_id))

    return make


def answers(item: Sequence) -> list[tuple[int, int]]:
    """First and end position of every answer, by a plain walk."""
    found, start = [], None
    for position, weight in enumerate([*item.loss_weight.tolist(), 0.0]):
        if weight > 0 and start is None:
            start = position
        elif weight == 0 and start is not None:
            found.append((start, position))
            start = None
    return found


def expected(item: Sequence, d: int) -> tuple[list, list[int], set, set]:
    """Inputs (None for a register), positions, pairs that see each other, and targets of a sequence.

    Written from the method's definition with lists only; targets are (place of the state, id).
    """
    ids = item.input_ids.tolist()
    of = {position: span for span in answers(item) for position in range(*span)}
    inputs, positions, place = [], [], {}
    targets = set()
    for position, token in enumerate(ids):
        if position in of:
            at, end = position + d - 1, of[position][1]
            if at < end:
                targets.add((len(inputs), ids[at]))
            inputs.append(None)
            positions.append(min(at - 1, len(ids) - 1))
        place[position] = len(inputs)
        inputs.append(token)
        positions.append(position)
    targets |= {(place[position - 1], ids[position]) for position in of}
    pairs = {(i, j) for i in range(len(inputs)) for j in range(i + 1) if inputs[j] is not None or i == j}
    return inputs, positions, pairs, targets


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("d", [1, 2, 4])
def test_layout_is_that_of_the_definition(d, packing, attached, batches, table, monkeypatch):
    policy = attached(d_max=4)
    monkeypatch.setattr(policy, "_offsets", lambda batch, seed: torch.full((batch.sequences,), d))
    for batch in batches(60, packing):
        arranged = policy.arrange(batch, (0, 0), 0.5)
        for number, row in enumerate(batch.table_index.tolist()):
            inputs, positions, pairs, targets = expected(table.sequence(row), d)
            (line,) = {r for r, n in (arranged.sequence == number).nonzero().tolist() for n in [n]}
            mine = (arranged.sequence[line] == number).nonzero().flatten()
            first = int(mine[0])
            assert mine.tolist() == list(range(first, first + len(inputs)))
            added = arranged.added[line, mine].tolist()
            assert added == [one is None for one in inputs]
            found = arranged.input_ids[line, mine].tolist()
            assert [None if new else id for id, new in zip(found, added, strict=True)] == inputs
            assert arranged.position_ids[line, mine].tolist() == positions
            seen = arranged.attention[line, mine]
            assert {(i, j - first) for i, j in seen.nonzero().tolist()} == pairs
            own = arranged.target_sequence == number
            places, ids = arranged.predicting[1][own] - first, arranged.target_ids[own]
            assert set(zip(places.tolist(), ids.tolist(), strict=True)) == targets
            assert len(places) == len(targets)


def test_length_is_prompt_and_twice_the_answer(attached, batches, table):
    policy = attached()
    lengths = policy.input_lengths(table)
    for batch in batches(1):
        arranged = policy.arrange(batch, (0, 0), 0.5)
        (row,) = batch.table_index.tolist()
        weight = table.loss_weight[table.offsets[row] : table.offsets[row + 1]]
        q, n = int((weight == 0).sum()), int((weight > 0).sum())
        assert arranged.input_ids.shape == (1, q + 2 * n) and lengths[row] == q + 2 * n
        assert arranged.tokens == batch.tokens == q + n  # registers are no tokens of the data


def test_d_is_drawn_evenly_once_a_row_and_visit(attached, batches):
    policy = attached(d_max=3)
    drawn = torch.cat([policy._offsets(b, (0, step)) for step in range(100) for b in batches()])
    counts = torch.bincount(drawn)
    assert counts[0] == 0 and len(counts) == 4 and (abs(counts[1:] - 400) < 5 * np.sqrt(400)).all()
    whole, cut = batches(10_000)[0], batches(1)
    by_row = dict(zip(whole.table_index.tolist(), policy._offsets(whole, (0, 5)).tolist(), strict=True))
    assert all(policy._offsets(batch, (0, 5)).item() == by_row[int(batch.table_index)] for batch in cut)


def hidden(bundle, policy: Mutor, batch: Batch) -> torch.Tensor:
    """States of all inputs, registers included."""
    seeing = functools.partial(policy.perturb, seed=(0, 0))
    view = StepView(bundle.model, bundle.architecture, batch, perturb=seeing)
    with view._perturbed():
        return bundle.architecture.hidden_states(bundle.model, batch)


@pytest.mark.parametrize("packing", [False, True])
def test_tokens_do_not_notice_registers(packing, bundle, attached, batches):
    """The states, and so the logits, of all tokens equal those without registers."""
    policy = attached()
    for batch in batches(60, packing):
        arranged = policy.arrange(batch, (0, 0), 0.5)
        with torch.no_grad():
            plain = bundle.architecture.hidden_states(bundle.model, batch)[batch.sequence >= 0]
            with_registers = hidden(bundle, policy, arranged)[(arranged.sequence >= 0) & ~arranged.added]
        torch.testing.assert_close(with_registers, plain, rtol=1e-5, atol=1e-5)


def test_a_register_is_a_token_in_the_place_of_its_target_minus_one(bundle, attached, table):
    """Its state is that of a row that holds the tokens before it and the register, and nothing else."""
    policy = attached(d_max=3)
    batch = next(iter(micro_batches(table, np.array([4]), 1000, False, 0)))
    arranged = policy.arrange(batch, (0, 0), 0.5)
    with torch.no_grad():
        states = hidden(bundle, policy, arranged)
        embed = bundle.model.get_input_embeddings()
        tokens = ~arranged.added[0]
        for place in arranged.added[0].nonzero().flatten().tolist():
            before = tokens[:place].nonzero().flatten()
            embedded = torch.cat([embed(arranged.input_ids[0, before]), policy._register.vector[None]])
            at = torch.cat([torch.arange(len(before)), arranged.position_ids[0, place : place + 1]])
            mask = torch.ones(len(at), len(at), dtype=torch.bool).tril()[None, None]
            alone = bundle.model.model(inputs_embeds=embedded[None], position_ids=at[None], attention_mask=mask)
            torch.testing.assert_close(states[0, place], alone.last_hidden_state[0, -1], rtol=1e-5, atol=1e-5)


def test_with_d_1_a_register_predicts_what_its_neighbour_does(attached, batches):
    policy = attached(d_max=1)
    for batch in batches():
        arranged = policy.arrange(batch, (0, 0), 0.5)
        row, place = arranged.predicting
        at = dict(zip(zip(row.tolist(), place.tolist(), strict=True), arranged.target_ids.tolist(), strict=True))
        for line, register in arranged.added.nonzero().tolist():
            assert at[line, register] == at[line, register - 1]
            assert arranged.position_ids[line, register] == arranged.position_ids[line, register - 1]


def stepped(bundle, policy: Mutor, arranged: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    """Loss of the step as the loop computes it, and the factors."""
    count = max(1.0, sum(Sft().count(batch) for batch in arranged))  # as the loop does
    perturb = functools.partial(policy.perturb, seed=(0, 0))
    views = [
        StepView(bundle.model, bundle.architecture, batch, perturb=perturb, counts={"loss": count})
        for batch in arranged
    ]
    statistics = torch.cat([policy.statistic(view) for view in views])
    total = torch.zeros(())
    factors = []
    for view in views:
        view.step_statistics = statistics
        view.factors = policy.weigh(view)
        assert not view.factors.requires_grad
        factors.append(view.factors)
        total = total + Sft().loss(view).value / count
    total.backward()
    return total.item(), factors


@pytest.mark.parametrize("a", [0.0, 0.3])
def test_loss_is_two_means(a, bundle, attached, batches):
    """Against losses from the model's own logits, in numpy."""
    policy = attached(register_weight=a)
    arranged = [policy.arrange(batch, (0, 0), 0.5) for batch in batches()]
    tokens, registers = [], []
    with torch.no_grad():
        for batch in arranged:
            logits = bundle.model.lm_head(hidden(bundle, policy, batch)).double().numpy()
            for row, place, target in zip(
                *(part.tolist() for part in (*batch.predicting, batch.target_ids)), strict=True
            ):
                scores = logits[row, place]
                nll = np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target]
                (registers if batch.added[row, place] else tokens).append(nll)
    expected = (1 - a) * np.mean(tokens) + a * np.mean(registers)
    loss, _ = stepped(bundle, policy, arranged)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_cut_does_not_matter(bundle, attached, batches):
    policy = attached()
    found = []
    for tokens, packing in ((60, False), (1, False), (10_000, False), (60, True)):
        bundle.model.zero_grad()
        policy._register.zero_grad()
        loss, _ = stepped(bundle, policy, [policy.arrange(b, (0, 0), 0.5) for b in batches(tokens, packing)])
        found.append((loss, policy._register.vector.grad.clone()))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-6)


def test_without_register_loss_only_tokens_train(bundle, attached, batches):
    policy = attached(register_weight=0)
    stepped(bundle, policy, [policy.arrange(batch, (0, 0), 0.5) for batch in batches()])
    assert not policy._register.vector.grad.any()


def test_an_answer_too_short_for_its_d_has_no_register_loss(bundle, attached, monkeypatch):
    """The step has no register target at all: its loss is (1 - a) times that of the tokens, not NaN."""
    item = Sequence(np.array([5, 6, 7], np.int32), np.array([0, 0, 1], np.float32), 0)
    policy = attached(d_max=4)
    monkeypatch.setattr(policy, "_offsets", lambda batch, seed: torch.full((batch.sequences,), 4))
    (batch,) = micro_batches(TokenTable.from_sequences([item]), np.arange(1), 100, False, 0)
    arranged = policy.arrange(batch, (0, 0), 0.5)
    assert arranged.trained_tokens == 1 and arranged.position_ids.tolist() == [[0, 1, 2, 2]]
    loss, _ = stepped(bundle, policy, [arranged])
    plain = float(StepView(bundle.model, bundle.architecture, batch).token_nll.mean().detach())
    assert loss == pytest.approx(0.7 * plain, rel=1e-5)


def test_a_row_without_answer_stays_as_it_is(bundle, attached):
    item = Sequence(np.array([5, 6, 7], np.int32), np.zeros(3, np.float32), 0)
    policy = attached()
    (batch,) = micro_batches(TokenTable.from_sequences([item]), np.arange(1), 100, False, 0)
    arranged = policy.arrange(batch, (0, 0), 0.5)
    assert torch.equal(arranged.input_ids, batch.input_ids) and arranged.trained_tokens == 0
    loss, _ = stepped(bundle, policy, [arranged])
    assert loss == 0


def test_a_bidirectional_prompt_sees_itself_whole(attached, batches, table):
    policy = attached(prompt="bidirectional")
    for batch in batches(60, packing=True):
        causal, arranged = attached().arrange(batch, (0, 0), 0.5), policy.arrange(batch, (0, 0), 0.5)
        later = (arranged.attention & ~causal.attention).nonzero().tolist()
        expected = set()
        for number, row in enumerate(batch.table_index.tolist()):
            (line, first), *_ = (arranged.sequence == number).nonzero().tolist()
            length = answers(table.sequence(row))[0][0]
            expected |= {(line, first + i, first + j) for i in range(length) for j in range(i + 1, length)}
        assert {tuple(pair) for pair in later} == expected


def test_registers_do_not_mix_with_remembered_numbers(attached, batches):
    batch = replace(batches()[0], remembered={"loss": torch.zeros(1)})
    with pytest.raises(ConfigError, match="another token policy remembers"):
        attached().arrange(batch, (0, 0), 0.5)


@pytest.mark.parametrize("knobs", [{"d_max": 0}, {"register_weight": 1.0}, {"register_weight": -0.1}])
def test_bad_knobs(knobs):
    with pytest.raises(ConfigError, match=f"tokens.{next(iter(knobs))}"):
        Mutor(**knobs)


# ---- through the loop ----

QUICK = ["eval=[]", "data.heldout=0", "data.max_length=256", "train.batch_size=8", "train.max_steps=3"]


def words(tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[str]:
    return ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *QUICK, *more]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out)]


def test_without_register_loss_a_run_is_sft(tiny_dir, rows_file, tmp_path):
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "sft"))
    more = ("tokens=mutor", "tokens.register_weight=0")
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "mutor", *more))
    np.testing.assert_allclose(losses(tmp_path / "mutor"), losses(tmp_path / "sft"), rtol=1e-5, atol=1e-5)
    tokens = [[line["tokens"] for line in lines(tmp_path / name)] for name in ("sft", "mutor")]
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_cut(tiny_dir, rows_file, tmp_path):
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "whole", "tokens=mutor"))
    for cut in ("train.batch_tokens=1", "train.packing=true", "train.batch_tokens=200"):
        ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / cut, "tokens=mutor", cut))
        np.testing.assert_allclose(
            losses(tmp_path / "whole"), losses(tmp_path / cut), rtol=1e-5, atol=1e-5, err_msg=cut
        )


def test_adapters_checkpoints_and_what_is_left(tiny_dir, rows_file, tmp_path):
    """LoRA with recomputed activations; the saved adapter knows no register, and the merged model writes text."""
    out = tmp_path / "lora"
    more = ("tokens=mutor", "adapter=lora", "train.gradient_checkpointing=true")
    ftrun.run("train", overrides=words(tiny_dir, rows_file, out, *more))
    ftrun.run("train", overrides=words(tiny_dir, rows_file, tmp_path / "plain", *more[:2]))
    np.testing.assert_allclose(losses(out), losses(tmp_path / "plain"), rtol=1e-5, atol=1e-5)
    newest = sorted((out / "train/checkpoints").glob("step-*"))[-1]
    assert load_file(newest / "trainable.safetensors")["tokens.vector"].shape == (32,)
    assert all("lora" in name for name in load_file(out / "adapter/adapter_model.safetensors"))
    ftrun.run("merge", overrides=[f"run={out}"])
    merged: Any = AutoModelForCausalLM.from_pretrained(out / "model")
    assert merged.state_dict().keys() == AutoModelForCausalLM.from_pretrained(tiny_dir).state_dict().keys()
    ids = torch.arange(5, 9)[None]
    written = merged.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    step = merged(written[:, :-1]).logits.argmax(-1)[0, 3:]
    assert torch.equal(step, written[0, 4:])  # as it reads in one pass, without any register


def test_a_resumed_run_goes_on_with_its_register(tiny_dir, rows_file, tmp_path):
    more = ("tokens=mutor", "train.max_steps=4", "train.save_steps=2", "schedule=constant")
    whole = words(tiny_dir, rows_file, tmp_path / "whole", *more)
    ftrun.run("train", overrides=whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/train/checkpoints/step-000004")
    same = [word for word in whole if not word.startswith("out=")]
    ftrun.run("train", overrides=[*same, f"resume={tmp_path / 'cut'}"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny_dir, rows_file, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        more = ("tokens=mutor", "launch.threads=1", f"launch.processes={processes}")
        overrides = words(tiny_dir, rows_file, tmp_path / out, *more)
        ftrun.run("train", overrides=overrides)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5, atol=1e-5)
