"""Critical tokens against a loop that tries one change at a time."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from ftrun.data.answers import Check
from ftrun.data.prepare import prepare
from ftrun.data.records import Message, Record
from ftrun.data.render import Renderer
from ftrun.errors import ConfigError, DataError
from ftrun.tokens import continuations
from ftrun.tokens.policies import critical_token_ft
from ftrun.tokens.policies.critical_token_ft import CriticalTokenFt
from ftrun.tokens.run import edit_rows, run_tokens

LONGEST = 6


@pytest.fixture(autouse=True)
def chatty(bundle, monkeypatch):
    """A model that says different things after different words, and a third of all tokens end an answer."""
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)
    ends = [bundle.tokenizer.eos_token_id, *range(40, len(bundle.tokenizer), 3)]
    monkeypatch.setattr(continuations, "stop_ids", lambda bundle, renderer: ends)
    return ends


@pytest.fixture
def checked(monkeypatch):
    """``checked(score)``: every row is checked by this function of a text."""

    def use(score):
        monkeypatch.setattr(
            critical_token_ft, "check_of", lambda record, metric, where: Check("exact_match", "gold", score)
        )

    return use


def records(count: int = 10) -> list[Record]:
    found = []
    for i in range(count):
        turns = (Message("user", f"what is {i} plus {i % 3}"), Message("assistant", "the dog"))
        fields = {"instruction": turns[0].content, "output": "the dog", "answer": str(i)}
        found.append(Record(i, "sft", turns, answer=str(i), fields=fields))
    return found


def odd(text: str) -> float:
    return float(sum(text.encode()) % 2)


def greedy(bundle, ids: list[int], ends: list[int]) -> list[int]:
    """Up to LONGEST tokens by a plain loop without a cache."""
    new: list[int] = []
    while len(new) < LONGEST and not (new and new[-1] in ends):
        with torch.no_grad():
            logits = bundle.model(torch.tensor([ids + new])).logits[0, -1]
        new.append(int(logits.argmax()))
    return new


def text_of(bundle, ids: list[int], ends: list[int]) -> str:
    return bundle.tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=True).strip()


@pytest.fixture
def ready(bundle, context, tmp_path):
    """``ready(policy)``: the context after the edit, and the table of the edited rows."""

    def make(policy: CriticalTokenFt, rows=None):
        ctx = context("critical_token_ft")
        pool = edit_rows(policy, cast(Any, rows or records()), ctx)
        knobs = {"context_length": 512, "vocab_size": len(bundle.tokenizer), "folder": tmp_path / "tokens"}
        return ctx, prepare(pool, bundle.tokenizer, replace(ctx.settings.data, max_length=256), **knobs).table

    return make


def expected(bundle, ctx, table, score, ends):
    """Scores of all tokens of the table, one forward pass at a time."""
    lines = [json.loads(line) for line in (ctx.out / "selection" / "edited.jsonl").read_text().splitlines()]
    scores = np.full(len(table.input_ids), np.nan)
    for index in range(len(table)):
        turns = tuple(Message(turn["role"], turn["content"]) for turn in lines[int(table.record[index])]["messages"])
        ids = table.sequence(index).input_ids.tolist()
        first = len(Renderer(bundle.tokenizer).prompt_ids(Record(0, "sft", turns)))
        end = ids.index(bundle.tokenizer.eos_token_id, first)
        for at in range(first, end):
            with torch.no_grad():
                logits = bundle.model(torch.tensor([ids[:at]])).logits[0, -1]
            others = [int(token) for token in logits.argsort(descending=True) if int(token) != ids[at]][:2]
            good = []
            for token in others:
                new = [token] if token in ends else [token, *greedy(bundle, [*ids[:at], token], ends)]
                answer = ids[first:at] + new
                good.append(new[-1] in ends and score(text_of(bundle, answer, ends)) >= 1)
            scores[table.offsets[index] + at] = not any(good)
    return scores


def test_only_solved_questions_stay_with_the_models_own_answer(bundle, chatty, checked, context):
    checked(odd)
    ctx = context("critical_token_ft")
    rows = list(CriticalTokenFt(max_new_tokens=LONGEST).edit(records(), ctx))
    wanted = {}
    for record in records():
        ids = greedy(bundle, Renderer(bundle.tokenizer).prompt_ids(record), chatty)
        text = text_of(bundle, ids, chatty)
        if ids[-1] in chatty and text and odd(text):
            wanted[record.id] = text
    assert 0 < len(wanted) < 10
    assert {row["row"]: row["messages"][-1]["content"] for row in rows} == wanted
    assert all(row["messages"][0]["role"] == "user" and row["messages"][-1]["role"] == "assistant" for row in rows)


def test_critical_tokens_are_those_of_the_loop(bundle, chatty, checked, ready):
    checked(odd)
    policy = CriticalTokenFt(max_new_tokens=LONGEST)
    ctx, table = ready(policy)
    scores, weights = policy.precompute(table, ctx)
    wanted = expected(bundle, ctx, table, odd, chatty)
    np.testing.assert_array_equal(scores, wanted)
    assert 0 < np.nansum(wanted) < np.sum(~np.isnan(wanted))
    assert not (ctx.out / "selection" / "token_shards").exists()
    for index in range(len(table)):
        part = slice(int(table.offsets[index]), int(table.offsets[index + 1]))
        critical = scores[part] == 1
        end = int(np.flatnonzero(~np.isnan(scores[part]))[-1]) + 1
        kept = [*np.flatnonzero(critical), end] if critical.any() else []
        assert np.flatnonzero(weights[part]).tolist() == kept and set(weights[part]) <= {0.0, 1.0}
    facts = ctx.facts["critical_tokens"]
    assert facts["critical"] == int(np.nansum(wanted)) and facts["tested"] == int((~np.isnan(wanted)).sum())


def test_the_mask_depends_neither_on_order_nor_on_batches(bundle, checked, ready):
    checked(odd)
    policies = [CriticalTokenFt(max_new_tokens=LONGEST, batch_tokens=tokens) for tokens in (8192, 1)]
    found = []
    for policy in policies:
        ctx, table = ready(policy)
        found.append(policy.precompute(table, ctx))
        turned = table.rows(np.arange(len(table))[::-1])
        scores, _ = policy.precompute(turned, ctx)
        back = np.split(scores, turned.offsets[1:-1])[::-1]
        np.testing.assert_array_equal(np.concatenate(back), found[-1][0])
        shutil.rmtree(ctx.out)
    np.testing.assert_array_equal(found[0][0], found[1][0])


def test_a_checker_that_accepts_everything_leaves_nothing_critical(monkeypatch, checked, ready):
    checked(lambda text: 1.0)
    policy = CriticalTokenFt(max_new_tokens=LONGEST)
    ctx, table = ready(policy)
    writes = continuations.Continuations.write
    monkeypatch.setattr(  # all of them end
        continuations.Continuations,
        "write",
        lambda self, starts, title: [[*ids, self.stops[0]] for ids in writes(self, starts, title)],
    )
    with pytest.raises(DataError, match="is critical"):
        policy.precompute(table, ctx)
    assert ctx.facts["critical_tokens"]["answers_without"] == len(table)


def test_a_checker_that_rejects_every_change_makes_all_critical(bundle, checked, ready):
    checked(lambda text: 1.0)
    policy = CriticalTokenFt(max_new_tokens=LONGEST)
    ctx, table = ready(policy)
    checked(lambda text: 0.0)
    scores, weights = policy.precompute(table, ctx)
    assert np.nanmin(scores) == 1
    # a token of the chat's frame behind the turn's end is never trained; all others of the answer are
    np.testing.assert_array_equal(weights[~np.isnan(scores)], 1)
    assert (weights[np.asarray(table.loss_weight) == 0] == 0).all()


def test_some_positions_only(checked, ready):
    checked(lambda text: 1.0)
    policy = CriticalTokenFt(max_new_tokens=LONGEST, max_positions=2)
    ctx, table = ready(policy)
    checked(lambda text: 0.0)
    scores, _ = policy.precompute(table, ctx)
    tested = np.add.reduceat(~np.isnan(scores), table.offsets[:-1])
    assert tested.max() == 2
    assert ctx.facts["critical_tokens"]["tested"] == tested.sum() < ctx.facts["critical_tokens"]["positions"]


def test_positions_without_room_for_a_continuation_are_not_tested(bundle, checked, ready):
    """They would count as unfinished, which is wrong, and so as critical."""
    checked(lambda text: 1.0)
    policy = CriticalTokenFt(max_new_tokens=LONGEST)
    ctx, table = ready(policy)
    checked(lambda text: 0.0)
    scores, _ = policy.precompute(table, ctx)
    position = np.arange(len(scores)) - np.repeat(table.offsets[:-1], table.lengths)
    room = int(np.median(position[scores == 1]))
    ctx.bundle = replace(bundle, context_length=room + LONGEST)
    fewer, _ = policy.precompute(table, ctx)
    np.testing.assert_array_equal(~np.isnan(fewer), ~np.isnan(scores) & (position + 1 <= room))
    assert 0 < np.nansum(fewer) < np.nansum(scores)
    ctx.bundle = bundle
    with pytest.raises(DataError, match="no answer token to test"):
        CriticalTokenFt(max_new_tokens=bundle.context_length - 1).precompute(table, ctx)


def test_weights_of_the_table_are_multiplied(bundle, checked, ready):
    """What another method has left out stays out, whatever hangs on it."""
    checked(lambda text: 1.0)
    policy = CriticalTokenFt(max_new_tokens=LONGEST)
    ctx, table = ready(policy)
    checked(lambda text: 0.0)
    before = np.where(np.arange(len(table.input_ids)) % 3, 0.5 * np.asarray(table.loss_weight), 0)
    _, whole = policy.precompute(table, ctx)
    _, found = policy.precompute(table.with_weights(before), ctx)
    np.testing.assert_array_equal(found, whole * before.astype(np.float32))
    assert 0 < (found > 0).sum() < (whole > 0).sum()


def test_work_that_was_done_is_not_done_again(bundle, chatty, checked, ready, monkeypatch):
    """Killed between two alternatives, the first one is read from disk."""
    checked(odd)
    policy = CriticalTokenFt(max_new_tokens=LONGEST)
    ctx, table = ready(policy)
    write, written = continuations.Continuations.write, []

    def killed(self, starts, title):
        if title.startswith("try other token 2"):
            raise KeyboardInterrupt
        return write(self, starts, title)

    monkeypatch.setattr(continuations.Continuations, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        policy.precompute(table, ctx)
    monkeypatch.setattr(continuations.Continuations, "write", write)
    monkeypatch.setattr(continuations.Continuations, "minutes", lambda self, starts, new: 0.0)
    generate = continuations.Writer.generate

    def counted(self, bundle, prompts, stops, seed):
        written.append(len(prompts))
        return generate(self, bundle, prompts, stops, seed)

    monkeypatch.setattr(continuations.Writer, "generate", counted)
    scores, _ = CriticalTokenFt(max_new_tokens=LONGEST).precompute(table, ctx)
    assert sum(written) < ctx.facts["critical_tokens"]["tested"]
    np.testing.assert_array_equal(scores, expected(bundle, ctx, table, odd, chatty))


def test_answers_without_a_critical_token_are_left_out(bundle, chatty, checked, ready):
    checked(odd)
    policy = CriticalTokenFt(max_new_tokens=LONGEST)
    ctx, table = ready(policy)
    left = run_tokens(policy, table, ctx)
    assert len(left) == len(table) - ctx.facts["critical_tokens"]["answers_without"] < len(table)
    assert (left.trained_counts() >= 2).all()


def test_nothing_solved_is_said(checked, context):
    checked(lambda text: 0.0)
    ctx = context("critical_token_ft")
    with pytest.raises(DataError, match="leaves none of 10 rows"):
        edit_rows(CriticalTokenFt(max_new_tokens=LONGEST), cast(Any, records()), ctx)


def test_a_verifier_judges_the_edited_row_too(bundle, context):
    record = records(1)[0]
    row = critical_token_ft._row(
        replace(record, verifier="gsm_symbolic"), Check("verifier", "0", lambda text: 1.0), "it is 0"
    )
    again = Record(0, "sft", answer=row["answer"], verifier=row["verifier"], fields=row)
    check = critical_token_ft.check_of(again, row["check"], "")
    assert check.score("the answer is 0") == 1 and check.score("the answer is 1") == 0


@pytest.mark.parametrize("name", ["alternatives", "max_new_tokens", "max_positions", "batch_tokens"])
def test_wrong_knobs_are_refused(name):
    with pytest.raises(ConfigError, match=f"tokens.{name} must be at least 1"):
        CriticalTokenFt(**cast(Any, {name: 0}))
