"""Reordered texts, and the horizon of their middles."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ftrun.data.records import Record
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.tokens.policies.fill_in_the_middle import FillInTheMiddle, horizon_of, reordered

MARKERS = ["<P>", "<S>", "<M>"]
TEXTS = ["the quick brown fox jumps", "a lazy dog and then\n  yes ü no 漢字", "", "x", "0 1 2 3 4 5 6 7 8 9" * 3]


def edited(policy: FillInTheMiddle, ctx, texts=TEXTS) -> list[dict]:
    records = [Record(number, "text", text=text) for number, text in enumerate(texts)]
    return list(policy.edit(records, ctx))


def sequences(tokenizer, rows: list[dict]) -> TokenTable:
    made = []
    for number, row in enumerate(rows):
        ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        weight = np.ones(len(ids), np.float32)
        weight[0] = 0
        made.append(Sequence(np.array(ids, np.int32), weight, number))
    return TokenTable.from_sequences(made)


def remembered(policy: FillInTheMiddle, ctx, table: TokenTable, rows: list[dict]) -> np.ndarray:
    folder = ctx.out / "selection"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "edited.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return policy.remember(table, ctx)["horizon"]


def test_the_parts_are_those_of_the_text(context):
    for row in edited(FillInTheMiddle(fim_rate=1, markers=MARKERS), context()):
        head, middle = row["text"][: row["middle"]], row["text"][row["middle"] :]
        prefix, suffix = head.removeprefix("<P>").removesuffix("<M>").split("<S>")
        assert prefix + middle + suffix == TEXTS[row["row"]]


def test_the_rate_is_a_share_and_the_draw_follows_the_text(context):
    texts = [f"the dog {number}" for number in range(400)]
    rows = edited(FillInTheMiddle(markers=MARKERS), context(), texts)
    changed = [row["text"] for row in rows if row["middle"] is not None]
    assert 160 < len(changed) < 240
    again = edited(FillInTheMiddle(markers=MARKERS), context(), texts[::-1])
    assert {row["text"] for row in again} == {row["text"] for row in rows}
    plain = edited(FillInTheMiddle(fim_rate=0, markers=MARKERS), context(), texts)
    assert [row["text"] for row in plain] == texts and all(row["middle"] is None for row in plain)


def test_the_horizon_falls_by_one_in_m_to_zero(context, bundle):
    policy, ctx = FillInTheMiddle(fim_rate=1, markers=MARKERS), context()
    rows = edited(policy, ctx)
    table = sequences(bundle.tokenizer, rows)
    horizon = remembered(policy, ctx, table, rows)
    for index, row in enumerate(rows):
        start, end = table.offsets[index], table.offsets[index + 1]
        mine, ids = horizon[start:end], table.input_ids[start:end]
        middle = np.flatnonzero(np.isfinite(mine))
        m = len(middle)
        assert middle.tolist() == list(range(len(ids) - m, len(ids)))
        np.testing.assert_allclose(mine[middle], [(m - t) / m for t in range(1, m + 1)])
        assert mine[-1] == 0 and mine[middle[0]] < 1
        # the tokens of the middle and no others: the byte-level tokenizer's text of them is the middle
        text = bundle.tokenizer.decode(ids[middle[:-1]])
        assert text.endswith(row["text"][row["middle"] :]) and len(text) <= len(row["text"]) - row["middle"] + 3


def test_plain_texts_have_a_horizon_when_asked_for(context, bundle):
    ctx = context()
    for apply_to in ("fim", "fim+l2r"):
        policy = FillInTheMiddle(fim_rate=0, markers=MARKERS, apply_to=apply_to)
        rows = edited(policy, ctx, TEXTS[:2])
        table = sequences(bundle.tokenizer, rows)
        horizon = remembered(policy, ctx, table, rows)
        if apply_to == "fim":
            assert np.isnan(horizon).all()
        else:
            for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True):
                m = end - start
                np.testing.assert_allclose(horizon[start:end], (m - np.arange(1, m + 1)) / m)


def test_a_text_that_was_cut_has_no_horizon(context, bundle):
    policy, ctx = FillInTheMiddle(fim_rate=1, markers=MARKERS), context()
    rows = edited(policy, ctx)
    whole = sequences(bundle.tokenizer, rows)
    cut = [whole.sequence(index) for index in range(len(whole))]
    long = cut[4]
    pieces = [
        Sequence(long.input_ids[:10], long.loss_weight[:10], 4),
        Sequence(long.input_ids[9:], long.loss_weight[9:], 4),
    ]
    table = TokenTable.from_sequences([*cut[:4], *pieces])
    horizon = remembered(policy, ctx, table, rows)
    assert np.isnan(horizon[table.offsets[4] :]).all() and np.isfinite(horizon[: table.offsets[4]]).any()
    assert "1 texts were split or cut" in ctx.report.stream.getvalue()


def test_ids_of_another_text_have_no_horizon(bundle):
    ids = np.array(bundle.tokenizer("the dog")["input_ids"])
    assert horizon_of(bundle.tokenizer, "the fox", 0, ids) is None


def test_a_tokenizer_with_markers_of_its_own(context, monkeypatch):
    vocabulary = {"<|fim_prefix|>": 1, "<|fim_suffix|>": 2, "<|fim_middle|>": 3}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary)
    monkeypatch.setattr("ftrun.tokens.policies.fill_in_the_middle.load_tokenizer", lambda model: tokenizer)
    (row,) = edited(FillInTheMiddle(fim_rate=1), context(), ["the dog"])
    assert row["text"].startswith("<|fim_prefix|>") and "<|fim_suffix|>" in row["text"]


def test_a_tokenizer_without_is_told_of(context):
    ctx = context()
    (row,) = edited(FillInTheMiddle(fim_rate=1), ctx, ["the dog"])
    assert row["text"].startswith("<fim_prefix>")
    assert "no tokens for filling in the middle" in ctx.report.stream.getvalue()


def test_cuts_are_anywhere():
    random = np.random.default_rng(0)
    lengths = {len(text) - middle for text, middle in (reordered("abcd", random, ("p", "s", "m")) for _ in range(200))}
    assert lengths == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "knobs", [{"fim_rate": 1.5}, {"fim_rate": -0.1}, {"markers": ["a", "b"]}, {"markers": ["a", "", "c"]}]
)
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        FillInTheMiddle(**knobs)


def test_other_rows_are_refused(context):
    with pytest.raises(DataError, match="plain texts"):
        list(FillInTheMiddle(markers=MARKERS).edit([Record(0, "sft")], context()))
