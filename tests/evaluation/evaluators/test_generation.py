"""Generated answers: the same however they are batched, and judged by what the row says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ftrun.data import answers, verify
from ftrun.data.records import Message, Record
from ftrun.data.render import Renderer
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.evaluators.generation import Generation


@dataclass
class Rows:
    """As much of a pool as an evaluator asks of it."""

    records: list[Record]

    @property
    def ids(self) -> np.ndarray:
        return np.array([record.id for record in self.records])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, id: int) -> Record:
        return next(record for record in self.records if record.id == id)

    def origin(self, id: int) -> str:
        return f"rows.jsonl:{id + 1}"


def record(id: int, question: str, output: str = "yes", **given) -> Record:
    return Record(id, "sft", (Message("user", question), Message("assistant", output)), **given)


@pytest.fixture
def rows() -> Rows:
    """Eight prompts of very different length."""
    return Rows([record(id, "the quick brown fox " * (1 + 3 * (id % 4)) + str(id)) for id in range(8)])


@pytest.fixture
def fake_verifier(monkeypatch):
    """Scores an answer by a number that depends on every character of it."""

    def verify_text(text: str, fields: dict) -> float:
        assert "secret" in fields
        return (sum(text.encode()) % 100) / 99

    monkeypatch.setattr(answers, "verifier", lambda name: verify_text if name == "fake" else verify.verifier(name))


def greedy(bundle, record: Record, stops: set[int], tokens: int) -> list[int]:
    """The most likely continuation, one whole forward pass a token."""
    ids = Renderer(bundle.tokenizer).prompt_ids(record)
    new: list[int] = []
    while len(new) < tokens and not (new and new[-1] in stops):
        with torch.no_grad():
            new.append(int(bundle.model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


def test_left_padding_changes_no_answer(bundle, context, rows, fake_verifier):
    checked = Rows([record(r.id, r.messages[0].content, verifier="fake", fields={"secret": 1}) for r in rows.records])
    one, four, again = (
        Generation(batch_size=size, max_new_tokens=12).evaluate(bundle, context(heldout=checked)) for size in (1, 4, 4)
    )
    assert one == four == again
    assert {row["metric"] for row in one.predictions} == {"verifier"}
    assert len({row["output"] for row in one.predictions}) > 3, "answers that are all alike would prove nothing"
    stops = {bundle.tokenizer.eos_token_id}
    for row, prediction in zip(checked.records, one.predictions, strict=True):
        expected = greedy(bundle, row, stops, 12)
        text = bundle.tokenizer.decode([t for t in expected if t not in stops], skip_special_tokens=True).strip()
        assert prediction["output"] == text
        assert prediction["tokens"] == len(expected)
        assert prediction["finished"] == float(expected[-1] in stops)
        assert prediction["score"] == (sum(text.encode()) % 100) / 99


def test_stops_at_the_end_of_turn(bundle, context, rows):
    """With a head that always prefers the end of turn, every answer is empty and finished."""
    end = bundle.tokenizer.eos_token_id
    handle = bundle.model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([end]), 1e4)
    )
    try:
        found = Generation().evaluate(bundle, context(heldout=rows))
    finally:
        handle.remove()
    assert found.metrics["finished"].value == 1.0
    assert {(row["output"], row["tokens"]) for row in found.predictions} == {("", 1)}


def test_the_model_s_own_generation_settings_do_not_leak(bundle, context, rows, monkeypatch):
    plain = Generation(max_new_tokens=10).evaluate(bundle, context(heldout=rows))
    monkeypatch.setattr(bundle.model.generation_config, "repetition_penalty", 5.0)
    monkeypatch.setattr(bundle.model.generation_config, "do_sample", True)
    assert Generation(max_new_tokens=10).evaluate(bundle, context(heldout=rows)) == plain


def test_sampling_depends_on_the_seed_only(bundle, context, rows):
    ctx = context(heldout=rows)
    one, four = (
        Generation(batch_size=size, max_new_tokens=8, temperature=1.0).evaluate(bundle, ctx) for size in (1, 4)
    )
    assert one == four
    ctx.settings.seed = 1
    assert Generation(max_new_tokens=8, temperature=1.0).evaluate(bundle, ctx) != one
    assert Generation(max_new_tokens=8).evaluate(bundle, ctx) != one


def test_sampling_follows_the_softmax():
    from ftrun.models.generation import OwnNoise

    logits = torch.tensor([[0.0, 1.0, 2.0]])
    noise = OwnNoise([[1]], 2.0, seed=0)
    drawn = torch.tensor([int(noise(torch.zeros(1, 1), logits).argmax()) for _ in range(6000)])
    shares = torch.bincount(drawn, minlength=3) / 6000
    torch.testing.assert_close(shares, (logits[0] / 2).softmax(0), atol=0.02, rtol=0)


def test_processes_agree(bundle, context, rows, alone):
    reference = Generation(batch_size=2, max_new_tokens=6).evaluate(bundle, context(heldout=rows))
    shares = []
    for rank in range(2):
        team = alone(rank, 2)
        Generation(batch_size=2, max_new_tokens=6).evaluate(bundle, context(team, heldout=rows))
        shares.append(team.given[0])
    team = alone(1, 2, gathered=[shares])
    assert Generation(batch_size=2, max_new_tokens=6).evaluate(bundle, context(team, heldout=rows)) == reference


def test_rows_limits_and_the_preflight_s_drops_stay_out(bundle, context, rows, table):
    found = Generation(rows=3, max_new_tokens=2).evaluate(bundle, context(heldout=rows))
    assert [row["id"] for row in found.predictions] == [0, 1, 2]
    tokens = table.rows(np.arange(4))
    tokens.record = np.array([1, 3, 5, 6])
    found = Generation(rows=3, max_new_tokens=2).evaluate(bundle, context(heldout=rows, heldout_tokens=tokens))
    assert [row["id"] for row in found.predictions] == [1, 3, 5]


def test_what_cannot_be_answered_is_refused(bundle, context, rows):
    with pytest.raises(ConfigError, match="none were held out"):
        Generation().evaluate(bundle, context())
    with pytest.raises(ConfigError, match='kind "text"'):
        Generation().evaluate(bundle, context(heldout=Rows([Record(0, "text", text="fox")])))
    with pytest.raises(DataError, match="no room for 500 more"):
        Generation(max_new_tokens=500).evaluate(bundle, context(heldout=rows))
    with pytest.raises(ConfigError, match="at least 1"):
        Generation(rows=0)
    with pytest.raises(ConfigError, match="negative"):
        Generation(temperature=-1.0)
