"""lm-eval on local tasks, without a network."""

from __future__ import annotations

import json
import sys

import pytest

from ftrun.errors import ComponentError, ConfigError
from ftrun.evaluation.evaluators.lm_eval import LmEval
from ftrun.evaluation.evaluators.multiple_choice import MultipleChoice

ROWS = [
    {"question": "what is 2 plus 2", "choices": ["yes", "the lazy dog 4", "no no no"], "answer": 1},
    {"question": "the quick brown", "choices": ["fox jumps over", "7", "no"], "answer": 0},
    {"question": "is a dog lazy", "choices": ["no", "yes and then", "over"], "answer": 1},
]
TASK = """
task: tiny_choices
dataset_path: json
dataset_kwargs:
  data_files: {{file}}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with one YAML task on local rows."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tiny_choices.yaml").write_text(
        TASK.replace("{{file}}", str(data)).replace("{{{{", "{{").replace("}}}}", "}}")
    )
    return folder


def test_a_local_task_agrees_with_our_multiple_choice(bundle, context, tasks):
    padding = bundle.tokenizer.padding_side
    found = LmEval(tasks=["tiny_choices"], include_path=str(tasks), batch_size=2).evaluate(bundle, context())
    ours = MultipleChoice(path=str(tasks / "rows.jsonl")).evaluate(bundle, context())
    assert found.metrics["tiny_choices.acc"].value == ours.metrics["acc"].value
    assert found.metrics["tiny_choices.acc_norm"].value == ours.metrics["acc_norm"].value
    assert found.metrics["tiny_choices.acc"].n == 3
    assert found.metrics["tiny_choices.acc"].stderr == pytest.approx(ours.metrics["acc"].stderr)
    assert [row["acc"] for row in found.predictions] == [row["score"] for row in ours.predictions]
    assert bundle.tokenizer.padding_side == padding


def test_limit(bundle, context, tasks):
    found = LmEval(tasks=["tiny_*"], include_path=str(tasks), limit=2).evaluate(bundle, context())
    assert found.metrics["tiny_choices.acc"].n == 2 and len(found.predictions) == 2


@pytest.mark.slow
def test_an_unknown_task_gets_the_nearest(tasks):
    with pytest.raises(ConfigError, match='no task "hellaswagg"') as caught:
        LmEval(tasks=["tiny_choices", "hellaswagg"], include_path=str(tasks)).index()
    assert "hellaswag" in caught.value.todo


def test_a_task_that_breaks_is_one_line(bundle, context, tasks):
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(ComponentError, match="lm-eval failed"):
        LmEval(tasks=["tiny_choices"], include_path=str(tasks)).evaluate(bundle, context())


def test_no_tasks_and_no_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no tasks"):
        LmEval().index()
    with pytest.raises(ConfigError, match="no folder"):
        LmEval(tasks=["x"], include_path=str(tmp_path / "absent")).index()


def test_without_the_package_it_says_how_to_get_it(bundle, context, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match="needs the package") as caught:
        LmEval(tasks=["x"]).evaluate(bundle, context())
    assert "pip install lm-eval" in caught.value.todo
