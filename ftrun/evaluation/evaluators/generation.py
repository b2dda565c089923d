"""Answers that the model writes, checked against the gold ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ftrun.data.records import Record
from ftrun.data.render import Renderer
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.answers import Check, check_of
from ftrun.evaluation.base import Evaluation, Evaluator, Metric, nothing_held_out
from ftrun.registry import register

if TYPE_CHECKING:
    from ftrun.runs.context import Context
    from ftrun.models.bundle import Bundle


@dataclass
class Prompt:
    """A held-out row ready to be answered."""

    record: Record
    ids: list[int]
    check: Check


@register("eval", "generation")
@dataclass
class Generation(Evaluator):
    """Generates an answer to held-out prompts and checks it.

    ``accuracy`` is the mean score of the answers (1 right, 0 wrong), ``finished`` the share that ended by themselves
    within ``max_new_tokens``. The prompt is what training saw before the response. An answer is right by the row's
    verifier, by its last number, as the exact text, if it contains the gold words, or in part, by the F1 of its words;
    auto takes the verifier if there is one, the last number if the answer field is one, else the exact text.
    Sampling draws from a generator of each row's own, so answers depend neither on the batch nor on the number of
    processes.
    """

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
        mine = batches[ctx.team.rank :: ctx.team.world_size]
        stops = stop_ids(bundle, renderer)
        answered: list[dict[str, Any]] = []
        with ctx.report.task("generate answers", sum(map(len, mine)), unit="rows") as task:
            for batch in mine:
                outputs = self.generate(bundle, [prompt.ids for prompt in batch], stops, ctx.seed)
                for prompt, ids in zip(batch, outputs, strict=True):
                    answered.append(self._judge(bundle.tokenizer, prompt, ids, stops))
                task.advance(len(batch))
        predictions = [row for part in ctx.team.gather_object(answered) for row in part]
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

    def generate(
        self,
        bundle: Bundle,
        prompts: list[list[int]],
        stops: list[int],
        seed: int,
        processors: Sequence[LogitsProcessor] = (),
        until: StoppingCriteria | None = None,
    ) -> list[list[int]]:
        """New tokens of every prompt, up to and with the first stop token.

        ``processors`` change the logits before anything is drawn; a row also ends where ``until`` says so.
        """
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), bundle.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padding on the left: every answer begins at the same position
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        # what is not said here would come from the model's own generation_config.json
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=stops or None,
            pad_token_id=bundle.pad_id,
            use_cache=True,
        )
        changes = [*processors, *([OwnNoise(prompts, self.temperature, seed)] if self.temperature > 0 else [])]
        model: Any = bundle.model
        whole = model.generate(
            input_ids=ids.to(bundle.device),
            attention_mask=mask.to(bundle.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(changes),
            stopping_criteria=StoppingCriteriaList([until] if until else []),
        )
        return [_until_stop(row, stops) for row in whole[:, longest:].tolist()]

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


class OwnNoise(LogitsProcessor):
    """Sampling as a search for the highest logit: with Gumbel noise on all, it is a draw from the softmax."""

    def __init__(self, prompts: list[list[int]], temperature: float, seed: int):
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(_seed_of(prompt, seed)) for prompt in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        waits = [torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in self.generators]
        return scores / self.temperature - torch.stack(waits).log().to(scores.device)


def _seed_of(prompt: list[int], seed: int) -> int:
    content = hashlib.blake2b(repr((seed, prompt)).encode(), digest_size=7).digest()
    return int.from_bytes(content, "big")


def stop_ids(bundle: Bundle, renderer: Renderer) -> list[int]:
    """The template's end of turn and every token that tokenizer or model call an end of text."""
    named = getattr(getattr(bundle.model, "generation_config", None), "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return sorted({renderer.end_of_turn, *(end for end in [*ends, bundle.tokenizer.eos_token_id] if end is not None)})


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    """Without the padding that follows the first stop token."""
    end = next((at for at, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]
