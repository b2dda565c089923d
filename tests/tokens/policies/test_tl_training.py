"""TL-Training: which turns are trained, and the weights of a reply against the formula."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from ftrun.data.batches import micro_batches
from ftrun.data.calls import read_call
from ftrun.data.prepare import prepare
from ftrun.data.records import Message, Record
from ftrun.errors import ConfigError
from ftrun.objectives.sft import Sft
from ftrun.tokens.policies.tl_training import TlTraining, branches, squeezed
from ftrun.tokens.run import edit_rows
from ftrun.training.view import StepView

TOOLS = ["get_weather", "get_news", "get_weather_map", "quick"]
CALL = "get_weather(city='the fox', days=3)"


def record(id: int, *turns: tuple[str, str]) -> Record:
    messages = tuple(Message(cast(Any, role), content) for role, content in turns)
    return Record(id, "sft", messages, fields={"messages": [], "tools": TOOLS})


def dialogues() -> list[Record]:
    ask, call = ("user", "what is the weather"), ("assistant", CALL)
    return [
        record(
            0,
            ask,
            call,
            ("tool", "NameError: name 'x' is not defined"),
            call,
            ("tool", "3 degrees"),
            ("assistant", "3"),
        ),
        record(1, ask, call, ("user", "no"), ("assistant", "quick(a='yes')")),
        record(2, ask, call, ("tool", "not  Supported!"), ("assistant", "no")),
        record(3, ask, call),
    ]


@pytest.fixture
def ready(bundle, context, tmp_path):
    """``ready(policy)``: the context after the edit, and the table of the edited rows."""

    def make(policy: TlTraining):
        ctx = context("tl_training")
        ctx.settings.data.ignore = ["tools"]  # the template takes none; the policy reads them from the row
        pool = edit_rows(policy, cast(Any, dialogues()), ctx)
        knobs = {"context_length": 512, "vocab_size": len(bundle.tokenizer), "folder": tmp_path / "tokens"}
        return ctx, prepare(pool, bundle.tokenizer, replace(ctx.settings.data, max_length=512), **knobs).table

    return make


def test_turns_before_an_error_or_a_user_are_not_trained(context):
    ctx = context("tl_training")
    rows = list(TlTraining().edit(dialogues(), ctx))
    assert [(row["row"], len(row["messages"])) for row in rows] == [(0, 4), (0, 6), (1, 4), (2, 4), (3, 2)]
    assert rows[0]["messages"][1]["content"] == CALL  # the failed call stays in the context
    assert all(row["tools"] == TOOLS for row in rows)
    assert ctx.facts["tl_training_turns"] == {"failed": 2, "kept": 5, "no output": 1}


def test_no_patterns_keep_every_call_with_an_output(context):
    rows = list(TlTraining(errors=[]).edit(dialogues(), context("tl_training")))
    assert [(row["row"], len(row["messages"])) for row in rows] == [
        (0, 2),
        (0, 4),
        (0, 6),
        (1, 4),
        (2, 2),
        (2, 4),
        (3, 2),
    ]


def test_an_opening_turn_is_context(context):
    opened = record(0, ("assistant", "hi"), ("user", "what"), ("assistant", "yes"))
    assert [len(row["messages"]) for row in TlTraining().edit([opened], context("tl_training"))] == [3]


def test_branches_are_where_names_part():
    call = read_call(CALL)
    assert call is not None
    assert [CALL[place] for place in branches(call, TOOLS)] == ["g", "w", "("]
    assert branches(call, ["quick", "get_weather"]) == [0]  # nothing shared: K has one token
    assert squeezed("Name-Error: é_1 ") == "nameerroré1"


def expected(bundle, table, index: int, reply: str, max_weight: float) -> np.ndarray:
    """Weights of a reply: places of K and P by decoding one token after the other."""
    item = table.sequence(index)
    trained = np.flatnonzero(item.loss_weight)
    end = bundle.tokenizer.eos_token_id
    first = int(trained[trained > np.flatnonzero(item.input_ids[: trained[-1]] == end)[-1]][0])
    answer = item.input_ids[first : trained[-1] + 1].tolist()
    pieces = [bundle.tokenizer.decode([token]) for token in answer]
    assert "".join(pieces) == reply + "<|im_end|>"
    owner = [n for n, piece in enumerate(pieces) for _ in piece]
    keys = {owner[0], owner[reply.index("weather")], owner[reply.index("(")]}
    last = {owner[reply.index("fox") + 2], owner[reply.index("3")]} - keys
    others = len(answer) - len(keys) - len(last)
    w = min(others / len(keys), max_weight) if len(keys) < others else 1
    raw = np.array([w if n in keys else 1.0 for n in range(len(answer))])
    return raw / (w * len(keys) + len(last) + others)


@pytest.mark.parametrize("max_weight", [1.0, 2.0, 9.0])
def test_the_loss_of_a_reply_is_the_formula(bundle, ready, max_weight):
    policy = TlTraining(max_weight=max_weight)
    ctx, table = ready(policy)
    scores, weights = policy.precompute(table, ctx)
    index = 4  # the dialogue of one call
    wanted = expected(bundle, table, index, CALL, max_weight)
    part = slice(int(table.offsets[index]), int(table.offsets[index + 1]))
    np.testing.assert_allclose(weights[part][weights[part] > 0] / len(wanted), wanted, rtol=1e-6)
    if max_weight == 1:
        assert set(weights[part]) == {0.0, 1.0}
    weighed = table.with_weights(weights)
    (batch,) = micro_batches(weighed, np.array([index]), 10_000, False, bundle.pad_id)
    loss = Sft().loss(StepView(bundle.model, bundle.architecture, batch)).value / batch.trained_tokens
    ids = torch.tensor(table.sequence(index).input_ids.tolist())
    with torch.no_grad():
        nll = -torch.log_softmax(bundle.model(ids[None]).logits[0, :-1].double(), -1)[range(len(ids) - 1), ids[1:]]
    assert float(loss) == pytest.approx(float(nll.numpy()[weights[part][1:] > 0] @ wanted), rel=1e-5)
    assert np.isnan(scores[weights == 0]).all()


def test_only_the_last_reply_is_trained_and_plain_answers_weigh_alike(ready):
    policy = TlTraining()
    ctx, table = ready(policy)
    _, weights = policy.precompute(table, ctx)
    kept = table.with_weights(weights)
    per_row = np.add.reduceat(weights, table.offsets[:-1])
    np.testing.assert_allclose(per_row, kept.trained_counts(), rtol=1e-6)
    assert kept.trained_counts()[0] == kept.trained_counts()[4] < table.trained_counts()[0]
    plain = weights[table.offsets[1] : table.offsets[2]]
    assert set(plain[plain > 0]) == {1.0}
    assert ctx.facts["tl_training_replies"] == {"call": 3, "alike": 2, "none": 2}


def test_a_call_is_found_where_the_template_strips_it_and_letters_are_many_tokens(bundle):
    """Places against a walk that decodes token after token."""
    reply = "get_weather(city='日本語 👩‍👩‍👧', days=3)"
    ids = bundle.tokenizer(reply + "<|im_end|>", add_special_tokens=False)["input_ids"]
    counted: Counter[str] = Counter()
    asked = record(0, ("user", "what"), ("assistant", f"\n {reply} "))
    keys, last = TlTraining()._places(asked, bundle.tokenizer, ids, counted)
    ends = [len(bundle.tokenizer.decode(ids[: n + 1])) for n in range(len(ids))]

    def token(character: int) -> int:
        return next(n for n, end in enumerate(ends) if end > character)

    assert keys == {token(0), token(reply.index("weather")), token(reply.index("("))}
    assert last == {token(reply.index("',") - 1), token(reply.index("3"))}
    assert counted == {"call": 1, "alike": 1}
    TlTraining()._places(record(0, ("user", "what"), ("assistant", "quick(a=7)")), bundle.tokenizer, ids, counted)
    assert counted["lost"] == 1


def test_no_call_at_all_is_said(bundle, context, tmp_path):
    policy, ctx = TlTraining(), context("tl_training")
    ctx.settings.data.ignore = ["tools"]
    pool = edit_rows(policy, cast(Any, [record(0, ("user", "what"), ("assistant", "the dog"))]), ctx)
    knobs = {"context_length": 512, "vocab_size": len(bundle.tokenizer), "folder": tmp_path / "tokens"}
    table = prepare(pool, bundle.tokenizer, replace(ctx.settings.data, max_length=512), **knobs).table
    _, weights = policy.precompute(table, ctx)
    np.testing.assert_array_equal(weights, table.loss_weight)
    assert "no reply holds a call" in ctx.report.warnings[0]


@pytest.mark.parametrize("knobs", [{"max_weight": 0.5}, {"max_weight": float("inf")}, {"errors": ["..."]}])
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        TlTraining(**knobs)
