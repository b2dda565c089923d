"""Multiple choice by log-likelihood."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ftrun.data.sources import read
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.base import Evaluation, Evaluator, Metric
from ftrun.evaluation.likelihood import likelihood
from ftrun.registry import register

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@dataclass
class Question:
    """One row, checked. ``answer`` is the index of the right choice."""

    question: str
    choices: list[str]
    answer: int


@register("eval", "multiple_choice")
@dataclass
class MultipleChoice(Evaluator):
    """Which choice the model finds most likely after the question.

    ``acc`` compares the summed log-likelihoods of the choices, ``acc_norm`` those divided by the choice's length in
    characters (UTF-8 bytes), so that long choices are not at a disadvantage. A tie goes to the earlier choice.
    Rows hold ``question``, ``choices`` and ``answer``: an index from 0, a letter, or the choice itself.
    """

    path: str | None = None  # rows with question, choices, answer: a .jsonl, .json, .csv or .parquet file
    prompt: str = "Question: {question}\nAnswer:"  # what stands before a choice
    separator: str = " "  # between prompt and choice
    limit: int | None = None  # ask only the first rows
    batch_tokens: int | None = (
        None  # upper bound of the tokens in one batch, padding included; null: 1024 on a CPU, 4096 on a GPU
    )

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt:
            where = f"eval.multiple_choice.prompt={self.prompt!r}"
            raise ConfigError("the prompt does not hold the question", where, "Write {question} where it belongs.")

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        questions = self.questions()
        encoded = [
            self._encode(bundle.tokenizer, question, choice) for question in questions for choice in question.choices
        ]
        row_of = np.repeat(np.arange(len(questions)), [len(question.choices) for question in questions])
        sequences = []
        for row, (ids, start) in zip(row_of, encoded, strict=True):
            asked = np.zeros(len(ids), np.float32)
            asked[start:] = 1
            sequences.append(Sequence(np.array(ids, np.int32), asked, int(row)))
        found = likelihood(bundle, TokenTable.from_sequences(sequences), ctx, self.batch_tokens, "multiple choice")
        predictions = []
        for row, question in enumerate(questions):
            scores = -found.nll[row_of == row]
            bytes_of = np.array([len(choice.encode()) for choice in question.choices])
            output, output_norm = int(scores.argmax()), int((scores / bytes_of).argmax())
            predictions.append(
                {
                    "id": row,
                    "prompt": self.prompt.replace("{question}", question.question),
                    "output": question.choices[output],
                    "gold": question.choices[question.answer],
                    "score": float(output == question.answer),
                    "score_norm": float(output_norm == question.answer),
                    "log_likelihoods": [float(score) for score in scores],
                }
            )
        metrics = {
            "acc": Metric.mean(prediction["score"] for prediction in predictions),
            "acc_norm": Metric.mean(prediction["score_norm"] for prediction in predictions),
        }
        return Evaluation(metrics, predictions)

    def questions(self) -> list[Question]:
        """All rows, checked. Raises ConfigError without a path, DataError naming the row that is wrong."""
        if self.path is None:
            raise ConfigError(
                "eval=multiple_choice has no questions",
                "eval.multiple_choice.path",
                "Set eval.multiple_choice.path=FILE.",
            )
        found = []
        for raw in read(self.path):
            if self.limit is not None and len(found) >= self.limit:
                break
            found.append(_checked(raw.fields, f"{raw.file}:{raw.line}"))
        if not found:
            raise DataError(f"{self.path} holds no question", self.path)
        return found

    def _encode(self, tokenizer: Any, question: Question, choice: str) -> tuple[list[int], int]:
        """Ids of prompt and choice, and where the choice begins: at the first token that the prompt alone lacks."""
        prompt = self.prompt.replace("{question}", question.question)
        alone = tokenizer(prompt).input_ids
        ids = tokenizer(prompt + self.separator + choice).input_ids
        ended = _without_end(alone, ids)
        start = next((at for at, (a, b) in enumerate(zip(ended, ids, strict=False)) if a != b), len(ended))
        return ids, min(start, len(ids) - 1)


def _without_end(alone: list[int], ids: list[int]) -> list[int]:
    """``alone`` without the end token that some tokenizers add to every text."""
    return alone[:-1] if len(alone) > 1 and alone[-1] == ids[-1] and alone[-1] != ids[len(alone) - 1] else alone


def _checked(fields: dict[str, Any], where: str) -> Question:
    for name in ("question", "choices", "answer"):
        if name not in fields:
            todo = f"It has: {', '.join(fields)}."
            raise DataError(
                f'a multiple-choice row needs "question", "choices" and "answer"; "{name}" is missing', where, todo
            )
    choices = fields["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(item, str) and item for item in choices):
        raise DataError('"choices" must be a list of two or more texts', where)
    answer = _index(fields["answer"], choices)
    if answer is None:
        todo = "Give its index from 0, its letter, or the choice itself."
        raise DataError(f"the answer {fields['answer']!r} is none of the {len(choices)} choices", where, todo)
    return Question(str(fields["question"]), choices, answer)


def _index(answer: Any, choices: list[str]) -> int | None:
    """Index of the right choice; an exact choice wins over a letter, a letter over a number in a text."""
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        text = answer.strip().strip("().").upper()
        if len(text) == 1 and text in string.ascii_uppercase:
            answer = string.ascii_uppercase.index(text)
        elif text.isdigit():
            answer = int(text)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    return None
