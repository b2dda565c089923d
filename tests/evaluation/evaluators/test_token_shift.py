"""Ranks of a tuned model's tokens under its base, against a plain loop."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up_rows import Rows

from ftrun.config import compose
from ftrun.data.records import Message, Record
from ftrun.data.render import Renderer
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.evaluators.token_shift import TokenShift, details
from ftrun.evaluation.shifts import Answer, Comparison, plain_ids, shift
from ftrun.models.bundle import Bundle


@pytest.fixture
def rows() -> Rows:
    made = ["the quick brown fox " * (1 + 2 * (id % 3)) + str(id) for id in range(6)]
    return Rows(
        [Record(id, "sft", (Message("user", text), Message("assistant", "yes"))) for id, text in enumerate(made)]
    )


@pytest.fixture
def tuned(bundle) -> Bundle:
    """The base with some noise on its weights: what another model would say, near enough to share first ranks."""
    model = copy.deepcopy(bundle.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return replace(bundle, model=model)


@pytest.fixture
def against(monkeypatch, bundle):
    """The evaluator with the tiny bundle as the base."""

    def make(**knobs) -> TokenShift:
        evaluator = TokenShift(**{"max_new_tokens": 12, **knobs})
        monkeypatch.setattr(Comparison, "_base", lambda _self, _bundle, _ctx: bundle)
        return evaluator

    return make


@pytest.mark.parametrize("size", [1, 4])
def test_a_model_against_itself_is_unshifted(against, bundle, context, rows, size):
    found = against(context="same", batch_size=size).evaluate(bundle, context(heldout=rows))
    values = {name: metric.value for name, metric in found.metrics.items()}
    assert values["unshifted"] == 1 and values["marginal"] == values["shifted"] == 0
    assert values["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("read", ["plain", "same"])
def test_ranks_follow_a_plain_loop(against, tuned, bundle, context, rows, read):
    answers = Comparison(**vars(against(context=read))).answers(tuned, context(heldout=rows), "token_shift")
    assert len({len(answer.tokens) for answer in answers} - {0}) > 0
    for answer, record in zip(answers, rows.records, strict=True):
        template = Renderer(bundle.tokenizer).prompt_ids(record)
        asked = template if read == "same" else bundle.tokenizer(record.messages[0].content + "\n\n").input_ids
        for at, token in enumerate(answer.tokens):
            logits = []
            for model, prompt in ((tuned.model, template), (bundle.model, asked)):
                with torch.no_grad():
                    ids = torch.tensor([[*prompt, *answer.tokens[:at].tolist()]])
                    logits.append(model(input_ids=ids).logits[0, -1].double().numpy())
            p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in logits)
            assert p.argmax() == token, "greedy in the tuned model's own template"
            assert answer.rank[at] == 1 + (q > q[token]).sum()
            assert answer.kl[at] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-3, abs=1e-5)
            assert answer.probability[at] == pytest.approx(q[token], rel=1e-3)


def test_shares_add_up_and_neither_batches_nor_processes_matter(against, tuned, context, rows, alone):
    one, four = (against(batch_size=size).evaluate(tuned, context(heldout=rows)) for size in (1, 4))
    assert one == four
    assert sum(one.metrics[name].value for name in ("unshifted", "marginal", "shifted")) == pytest.approx(1)
    assert 0 < one.metrics["shifted"].value < 1, "a test on one kind alone would prove nothing"
    shares = []
    for rank in range(2):
        team = alone(rank, 2)
        Comparison(**vars(against(batch_size=2))).answers(tuned, context(team, heldout=rows), "token_shift")
        shares.append(team.given[0])
    assert all(shares)
    both = against(batch_size=2).evaluate(tuned, context(alone(1, 2, gathered=[shares]), heldout=rows))
    assert both == one


def test_vocabularies_may_differ_by_padding():
    tuned, base = torch.randn(3, 10), torch.randn(3, 8)
    targets = torch.tensor([0, 7, 3])
    for ours, theirs in zip(shift(tuned, base, targets), shift(tuned[:, :8], base, targets), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_details_count_positions_and_tokens(bundle, context, against, tuned, rows, tmp_path):
    ranks = np.array([1, 2, 9, 9, 4, 1, 5])
    answer = Answer(0, "", np.array([7, 8, 9, 9, 9, 8, 8]), ranks, np.zeros(7), np.zeros(7))
    found = details([answer], bundle.tokenizer)
    assert [part["tokens"] for part in found["by_position"]] == [5, 2]
    assert found["by_position"][0] | {"unshifted": 0.2, "marginal": 0.2, "shifted": 0.6} == found["by_position"][0]
    assert [(item["id"], item["count"]) for item in found["most_shifted"]] == [(9, 3), (8, 1)]
    evaluation = against().evaluate(tuned, context(heldout=rows))
    written = json.loads((tmp_path / "eval" / "token_shift.json").read_text())
    counted = Counter({item["token"]: item["count"] for item in written["most_shifted"]})
    assert counted == Counter(token for row in evaluation.predictions for token in row["shifted"])


def test_plain_text_has_no_markers(bundle, rows):
    assert "im_start" not in bundle.tokenizer.decode(plain_ids(rows[0], bundle.tokenizer))


def test_the_base_is_the_model_that_the_run_started_from(tiny_dir, bundle, context, rows):
    ctx = context(heldout=rows)
    ctx.settings = compose.load([f"model.path={tiny_dir}", "model.dtype=float32"]).settings
    named, unnamed = (TokenShift(base=base, max_new_tokens=4).evaluate(bundle, ctx) for base in (str(tiny_dir), None))
    assert named == unnamed


def test_a_model_that_was_not_trained_is_not_compared_with_itself_in_silence(tiny_dir, bundle, context, rows):
    def said(*words: str) -> bool:
        ctx = context(heldout=rows)
        ctx.settings = compose.load([f"model.path={tiny_dir}", "model.dtype=float32", *words]).settings
        TokenShift(max_new_tokens=2, rows=1).evaluate(bundle, ctx)
        return any("compared with itself" in text for text in ctx.report.warnings)

    assert said("recipe=urial_shift") and not said("recipe=lora_it_baseline")


def test_what_cannot_be_compared_is_refused(against, bundle, context, rows):
    with pytest.raises(ConfigError, match="eval=token_shift has no rows"):
        against().evaluate(bundle, context())
    with pytest.raises(DataError, match="no room for 500 more"):
        against(max_new_tokens=500).evaluate(bundle, context(heldout=rows))
    with pytest.raises(ConfigError, match="at least 1"):
        TokenShift(rows=0)
