"""Corrections that a model writes, judged."""

from __future__ import annotations

import numpy as np

from ftrun.data.records import Message, Record
from ftrun.evaluation.generation import Generation
from ftrun.evaluation.proofread import Proofread, without_punctuation

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


def test_matches_are_counted(bundle, context, monkeypatch):
    def generate(self, bundle, prompts, stops, seed):
        asked = [int(bundle.tokenizer.decode(prompt).split("fix ")[1][0]) for prompt in prompts]
        return [[*bundle.tokenizer(SAYS[number]).input_ids, stops[0]] for number in asked]

    monkeypatch.setattr(Generation, "generate", generate)
    found = Proofread().evaluate(bundle, context(heldout=Rows()))
    values = {name: metric.value for name, metric in found.metrics.items()}
    wanted = {"accuracy": 0.5, "normalised_match": 0.75, "source_match": 0.5, "spoiled_clean": 0.5, "finished": 1}
    assert values == wanted and found.metrics["spoiled_clean"].n == 2
    assert found.metrics["spoiled_clean"].higher_is_better is False


def test_normalised_texts_ignore_case_and_punctuation():
    assert without_punctuation("Don't  stop, Now!") == without_punctuation("dont stop now")
    assert without_punctuation("a b") != without_punctuation("ab")
