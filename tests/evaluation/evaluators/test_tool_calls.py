"""Calls that a model writes, judged."""

from __future__ import annotations

import numpy as np
import pytest

from ftrun.data.records import Message, Record
from ftrun.errors import ConfigError
from ftrun.evaluation.evaluators.tool_calls import ToolCalls
from ftrun.models.generation import Writer


class Rows:
    """As much of a pool as the evaluator asks of it."""

    def __init__(self, *responses: str):
        self.responses = responses
        self.ids = np.arange(len(responses))

    def __len__(self) -> int:
        return len(self.responses)

    def __getitem__(self, id: int) -> Record:
        turns = (Message("user", f"what is {id}"), Message("assistant", self.responses[id]))
        return Record(id, "sft", turns, fields={"tools": ["f", "g"]})

    def origin(self, id: int) -> str:
        return f"rows:{id}"


def test_calls_are_counted_by_how_right_they_are(bundle, context, monkeypatch):
    says = {"0": "f(a=1)", "1": "f(a=2)", "2": "g(a=1)", "3": "hm"}

    def generate(self, bundle, prompts, stops, seed):
        asked = [bundle.tokenizer.decode(prompt).split("what is ")[1][0] for prompt in prompts]
        return [[*bundle.tokenizer(says[word]).input_ids, stops[0]] for word in asked]

    monkeypatch.setattr(Writer, "generate", generate)
    found = ToolCalls().evaluate(bundle, context(heldout=Rows(*["f(a=1)"] * 4, "the dog")))
    assert [row["reward"] for row in found.predictions] == [1, -0.25, -1.5, -2]
    values = {name: metric.value for name, metric in found.metrics.items()}
    assert values == {"accuracy": 0.25, "finished": 1, "reward": -0.6875, "readable": 0.75, "right_tool": 0.5}


def test_rows_without_calls_are_refused(bundle, context):
    with pytest.raises(ConfigError, match="none of 2 held-out rows ends with a call"):
        ToolCalls().evaluate(bundle, context(heldout=Rows("the", "dog")))
