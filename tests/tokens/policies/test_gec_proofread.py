"""Typing errors in clean texts."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import numpy as np
import pytest

from ftrun.data.records import Message, Record
from ftrun.errors import ConfigError
from ftrun.tokens.policies.gec_proofread import KEYS, GecProofread
from ftrun.tokens.run import edit_rows

TEXT = "All the little foxes really jump over a Lazy Dog, and the 23 bees will follow. "


def texts(count: int = 40) -> list[Record]:
    return [Record(i, "text", text=f"{TEXT}{i} ", fields={"text": "x", "topic": "é"}) for i in range(count)]


def corrupt(kind: str, text: str = TEXT, seed: int = 0, **knobs: Any) -> str:
    policy = GecProofread(rate=1.0, kinds=cast(Any, [kind]), **knobs)
    return policy.corrupt(text, np.random.default_rng(seed))[0]


def test_a_row_is_the_faulty_text_and_its_clean_one(context):
    policy = GecProofread(rate=0.1, instruction="Fix it.")
    rows = list(policy.edit(texts(), context()))
    assert [row["row"] for row in rows] == list(range(40))
    for row, record in zip(rows, texts(), strict=True):
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert row["messages"][1]["content"] == record.text.strip()
        assert row["messages"][0]["content"] == f"Fix it.\n\n{row['source']}"
        assert row["topic"] == "é" and "text" not in row
    assert sum(row["source"] != row["messages"][1]["content"] for row in rows) > 25


def test_responses_of_conversations_are_clean_texts_too(context):
    record = Record(7, "sft", (Message("user", "say"), Message("assistant", "the dog")), fields={"output": "the dog"})
    (row,) = GecProofread(rate=0, clean_share=0).edit([record], context())
    assert row["source"] == "the dog" and row["messages"][1]["content"] == "the dog"


def test_a_text_never_loses_all_its_letters(context):
    record = Record(0, "text", text="a", fields={"text": "a"})
    (row,) = GecProofread(rate=1, clean_share=0, kinds=["drop"]).edit([record], context())
    assert row["source"] == "a"


def test_rate_zero_is_the_identity(context):
    assert all(row["source"] == row["messages"][1]["content"] for row in GecProofread(rate=0).edit(texts(), context()))


def test_the_share_of_clean_pairs(context):
    clean = [
        row["source"] == row["messages"][1]["content"]
        for row in GecProofread(rate=0.5, clean_share=0.3).edit(texts(400), context())
    ]
    assert np.mean(clean) == pytest.approx(0.3, abs=0.07)
    assert all(
        row["source"] == row["messages"][1]["content"] for row in GecProofread(clean_share=1).edit(texts(), context())
    )


def test_errors_follow_from_seed_and_text_alone(context):
    def made(records: list[Record], seed: int = 0) -> dict[str, str]:
        ctx = context()
        ctx.settings.seed = seed
        return {row["messages"][1]["content"]: row["source"] for row in GecProofread().edit(records, ctx)}

    assert made(texts()) == made(texts()[::-1]) == made(texts()) | made(texts()[3:9])
    assert made(texts()) != made(texts(), seed=1)


def test_the_rate_is_that_of_the_letters():
    text = "the quick brown fox " * 500
    _, errors = GecProofread(rate=0.05, kinds=["drop"]).corrupt(text, np.random.default_rng(0))
    assert errors / sum(letter.isalpha() for letter in text) == pytest.approx(0.05, abs=0.006)


def test_every_kind_does_what_it_says():
    assert corrupt("drop", "Ab 1, c") == " 1, "
    assert corrupt("double", "Ab 1") == "AAbb 1"
    assert corrupt("transpose", "abc aa") == "bac aa"
    assert corrupt("undouble", "All too") == "Al to"
    assert corrupt("space", "a b c") == "abc"
    assert corrupt("case", "aB 1") == "Ab 1"
    inserted = corrupt("insert", "aB1")
    assert len(inserted) == 5 and inserted[0] == "a" and inserted[1].islower() and inserted[3].isupper()
    hit = corrupt("neighbour", TEXT)
    assert len(hit) == len(TEXT)
    for before, after in zip(TEXT, hit, strict=True):
        assert (before != after) == before.isalpha() and before.isupper() == after.isupper()


def test_near_keys_are_hit_by_a_gaussian():
    """Shares of the keys hit in place of g against exp(-distance^2 / (2 spread^2))."""
    spread = 0.8
    hits = Counter(corrupt("neighbour", "g" * 20_000, spread=spread))
    weights = {
        key: np.exp(-(np.hypot(*np.subtract(KEYS[key], KEYS["g"])) ** 2) / (2 * spread**2))
        for key in KEYS
        if key != "g"
    }
    total = sum(weights.values())
    for key, weight in weights.items():
        assert hits[key] / 20_000 == pytest.approx(weight / total, abs=0.012)
    assert set(corrupt("neighbour", "g" * 50, spread=1e-3)) <= set("fh")  # the nearest two


def test_a_prompt_of_the_trained_model_gets_the_instruction():
    asked = GecProofread(instruction="Fix it.").edit_prompt(Record(0, "prompts", (Message("user", "teh"),)))
    assert asked.messages == (Message("user", "Fix it.\n\nteh"),)


def test_texts_become_conversations(context):
    pool = edit_rows(GecProofread(), cast(Any, texts(5)), context("gec_proofread"))
    assert pool.kind == "sft" and len(pool) == 5 and pool[0].fields["row"] == 0


@pytest.mark.parametrize("knobs", [{"rate": 1.1}, {"rate": -0.1}, {"clean_share": 2.0}, {"spread": 0.0}, {"kinds": []}])
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        GecProofread(**knobs)
