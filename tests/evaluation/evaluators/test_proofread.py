"""Corrections that a model writes, judged."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ftrun.data.records import Message, Record
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.evaluators import proofread as module
from ftrun.evaluation.evaluators.proofread import NO_ERROR, SAME_MEANING, Proofread, _ids_of, without_punctuation
from ftrun.models.generation import Writer

SOURCES, CLEAN = ["teh fox", "the dog.", "a fxo", "yes"], ["the fox", "the dog.", "A fox!", "yes"]
SAYS = ["the fox", "the dgo.", "a fox", "yes"]


class Rows:
    """As much of a pool as the evaluator asks of it."""

    ids = np.arange(4)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, id: int) -> Record:
        turns = (Message("user", f"fix {id}"), Message("assistant", CLEAN[id]))
        return Record(id, "sft", turns, fields={"source": SOURCES[id]})

    def origin(self, id: int) -> str:
        return f"rows:{id}"


@pytest.fixture
def says(monkeypatch):
    """A model that writes SAYS."""

    def generate(self, bundle, prompts, stops, seed):
        asked = [int(bundle.tokenizer.decode(prompt).split("fix ")[1][0]) for prompt in prompts]
        return [[*bundle.tokenizer(SAYS[number]).input_ids, stops[0]] for number in asked]

    monkeypatch.setattr(Writer, "generate", generate)


def test_matches_are_counted(bundle, context, says):
    found = Proofread().evaluate(bundle, context(heldout=Rows()))
    values = {name: metric.value for name, metric in found.metrics.items()}
    wanted = {"accuracy": 0.5, "normalised_match": 0.75, "source_match": 0.5, "spoiled_clean": 0.5, "finished": 1}
    assert values == wanted and found.metrics["spoiled_clean"].n == 2
    assert found.metrics["spoiled_clean"].higher_is_better is False


def test_good_is_no_error_and_the_same_meaning(bundle, context, says, tiny_dir, monkeypatch):
    """Four rows: both, an error only, another meaning only, both faults."""
    chances = np.array([[0.6, 0.1], [0.1, 0.2], [0.3, 0.2], [0.2, 0.2], [0.5, 0.1], [0.5, 0.4], [0.0, 0.1], [0.1, 0.3]])
    monkeypatch.setattr(module, "next_token", lambda *_: SimpleNamespace(asked=chances))
    found = Proofread(judge=str(tiny_dir)).evaluate(bundle, context(heldout=Rows()))
    values = {name: found.metrics[name].value for name in ("error", "other_meaning", "good", "bad")}
    assert values == {"error": 0.5, "other_meaning": 0.5, "good": 0.25, "bad": 0.75}
    assert [row["no_error"] and row["same_meaning"] for row in found.predictions] == [True, False, False, False]
    assert found.metrics["good"].higher_is_better and not found.metrics["bad"].higher_is_better


def test_the_judge_says_what_it_finds_likelier(bundle, context, says, tiny_dir):
    ctx = context(heldout=Rows())
    ctx.settings.model.dtype = "float32"
    found = Proofread(judge=str(tiny_dir)).evaluate(bundle, ctx)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_dir), bundle.tokenizer
    yes, no = (_ids_of(word, bundle, "") for word in ("yes", "no"))
    assert yes and no and not {*yes} & {*no}
    assert {tokenizer.decode([number]).strip().lower() for number in yes} == {"yes"}
    for row, gold in zip(found.predictions, CLEAN, strict=True):
        for name, asked, text in (
            ("no_error", NO_ERROR, row["output"]),
            ("same_meaning", SAME_MEANING, f"First text:\n{row['output']}\n\nSecond text:\n{gold}"),
        ):
            turns = [{"role": "system", "content": asked}, {"role": "user", "content": text}]
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            with torch.no_grad():
                logits = model(torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])).logits[0, -1]
            p = np.exp(logits.double().numpy())
            assert row[name] == (p[yes].sum() > p[no].sum())
    good, error, other = (found.metrics[name].value for name in ("good", "error", "other_meaning"))
    assert good <= min(1 - error, 1 - other) and found.metrics["bad"].value == pytest.approx(1 - good)


def test_a_judge_that_cannot_answer_is_refused(bundle, context, says, tiny_dir, monkeypatch):
    monkeypatch.setattr(module, "NO_ERROR", "fox " * 600)
    with pytest.raises(DataError, match="a question to the judge has"):
        Proofread(judge=str(tiny_dir)).evaluate(bundle, context(heldout=Rows()))
    with pytest.raises(ConfigError, match='no token for "quicklazy"'):
        _ids_of("quicklazy", bundle, "x")


def test_normalised_texts_ignore_case_and_punctuation():
    assert without_punctuation("Don't  stop, Now!") == without_punctuation("dont stop now")
    assert without_punctuation("a b") != without_punctuation("ab")
