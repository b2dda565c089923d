"""Held-out prompts that the model answers, and the judgement of its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ftrun.data.answers import Check, check_of
from ftrun.data.records import Record
from ftrun.data.render import Renderer
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.base import Evaluation, Evaluator, Metric, nothing_held_out
from ftrun.models.generation import Writer, stop_ids

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@dataclass
class Prompt:
    """A held-out row ready to be answered."""

    record: Record
    ids: list[int]
    check: Check


@dataclass
class Answering(Evaluator):
    """Base of evaluators that let the model answer held-out prompts, and judge each answer against the gold one."""

    rows: int = 16  # held-out rows to answer, the first ones
    max_new_tokens: int = 128  # longest answer, in tokens
    batch_size: int = 8  # rows generated at a time
    temperature: float = 0.0  # 0 takes the most likely token, 1 samples from the model's own distribution
    metric: Literal["auto", "verifier", "last_number", "exact_match", "contains", "word_f1"] = "auto"  # how to check

    asks_heldout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("rows", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                where = f"eval.generation.{name}={getattr(self, name)}"
                raise ConfigError(f"eval.generation.{name} must be at least 1", where)
        if self.temperature < 0:
            raise ConfigError("a temperature cannot be negative", f"eval.generation.temperature={self.temperature:g}")

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        renderer = Renderer(bundle.tokenizer)
        prompts = sorted(self._prompts(bundle, renderer, ctx), key=lambda prompt: (-len(prompt.ids), prompt.record.id))
        batches = [prompts[start : start + self.batch_size] for start in range(0, len(prompts), self.batch_size)]
        mine = ctx.team.share(batches)
        stops = stop_ids(bundle, renderer)
        writer = Writer(self.max_new_tokens, self.temperature)
        answered: list[dict[str, Any]] = []
        with ctx.report.task("generate answers", sum(map(len, mine)), unit="rows") as task:
            for batch in mine:
                outputs = writer.generate(bundle, [prompt.ids for prompt in batch], stops, ctx.seed)
                for prompt, ids in zip(batch, outputs, strict=True):
                    answered.append(self._judge(bundle.tokenizer, prompt, ids, stops))
                task.advance(len(batch))
        predictions = [row for part in ctx.team.collect(answered) for row in part]
        predictions.sort(key=lambda row: row["id"])
        metrics = {
            "accuracy": Metric.mean(row["score"] for row in predictions),
            "finished": Metric.mean(row["finished"] for row in predictions),
        }
        return Evaluation(metrics, predictions)

    def _prompts(self, bundle: Bundle, renderer: Renderer, ctx: Context) -> list[Prompt]:
        """The first ``rows`` held-out rows. Raises ConfigError if there are none, DataError for one that is too long."""
        found = []
        for record, where in heldout_prompts(ctx, self.rows, "generation"):
            prompt = Prompt(record, renderer.prompt_ids(record, where), check_of(record, self.metric, where))
            if len(prompt.ids) + self.max_new_tokens > bundle.context_length:
                raise DataError(
                    f"row {record.id} has a prompt of {len(prompt.ids)} tokens: no room for {self.max_new_tokens} more "
                    f"in the {bundle.context_length} that the model attends to",
                    where,
                    "Lower eval.generation.max_new_tokens, or data.max_length to leave out such rows.",
                )
            found.append(prompt)
        return found

    def _judge(self, tokenizer: Any, prompt: Prompt, ids: list[int], stops: list[int]) -> dict[str, Any]:
        output = tokenizer.decode([token for token in ids if token not in stops], skip_special_tokens=True).strip()
        return {
            "id": prompt.record.id,
            "prompt": tokenizer.decode(prompt.ids),
            "output": output,
            "gold": prompt.check.gold,
            "score": float(prompt.check.score(output)),
            "metric": prompt.check.metric,
            "finished": float(bool(ids) and ids[-1] in stops),
            "tokens": len(ids),
        }


def heldout_prompts(ctx: Context, count: int, evaluator: str) -> list[tuple[Record, str]]:
    """The first held-out rows with a prompt to answer, and where each comes from. Raises ConfigError if there are none."""
    if ctx.heldout is None or len(ctx.heldout) == 0:
        raise nothing_held_out(evaluator, ctx)
    ids = np.asarray(ctx.heldout.ids)
    if ctx.heldout_tokens is not None:  # rows that the preflight dropped stay out here too
        ids = ids[np.isin(ids, ctx.heldout_tokens.record)]
    found = []
    for id in ids[:count]:
        record, where = ctx.heldout[int(id)], ctx.heldout.origin(int(id))
        if record.kind not in ("sft", "prompts"):
            todo = "Use eval=heldout, or rows with a prompt and a response."
            raise ConfigError(f'eval={evaluator} answers prompts, not rows of kind "{record.kind}"', where, todo)
        found.append((record, where))
    return found
