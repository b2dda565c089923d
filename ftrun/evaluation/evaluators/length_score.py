"""Whether answers are as long as their prompt asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftrun.data.render import Renderer
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.base import Evaluation, Evaluator, Metric
from ftrun.models.generation import Writer, stop_ids
from ftrun.registry import register
from ftrun.select.scoring.lengths import check_patterns, demanded_lengths, length_score, text_length

if TYPE_CHECKING:
    from ftrun.data.records import Record
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@register("eval", "length_score")
@dataclass
class LengthScore(Evaluator):
    """S_L of LongBench-Write (Bai et al., 2024, arXiv:2408.07055) over held-out prompts that state exactly one length.

    With r = length of the answer / stated length, S_L = 100 max(0, 1 - (r - 1) / 3) for r > 1, else
    100 max(0, 1 - (1 / r - 1) / 2). Chinese counts characters, other languages words. ``length_score`` is the mean;
    ``finished`` the share of answers that ended by themselves. An answer cut by ``max_new_tokens`` counts as it is.
    """

    rows: int = 16  # held-out rows that state a length to answer, the first ones
    max_new_tokens: int = 1024  # longest answer, in tokens
    batch_size: int = 8  # rows generated at a time
    temperature: float = 0.0  # 0 takes the most likely token, 1 samples from the model's own distribution
    patterns: list[str] = field(default_factory=list)  # regular expressions of further demands; group 1 is the number

    asks_heldout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("rows", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                where = f"eval.length_score.{name}={getattr(self, name)}"
                raise ConfigError(f"eval.length_score.{name} must be at least 1", where)
        if self.temperature < 0:
            raise ConfigError("a temperature cannot be negative", f"eval.length_score.temperature={self.temperature:g}")
        check_patterns(self.patterns, "eval.length_score.patterns")

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        renderer = Renderer(bundle.tokenizer)
        prompts = [(record, length, renderer.prompt_ids(record)) for record, length in self._demands(ctx)]
        prompts.sort(key=lambda prompt: (-len(prompt[2]), prompt[0].id))
        longest = len(prompts[0][2])
        if longest + self.max_new_tokens > bundle.context_length:
            raise DataError(
                f"a prompt of {longest} tokens leaves no room for {self.max_new_tokens} more in the "
                f"{bundle.context_length} that the model attends to",
                todo="Lower eval.length_score.max_new_tokens, or data.max_length to leave out such rows.",
            )
        batches = [prompts[start : start + self.batch_size] for start in range(0, len(prompts), self.batch_size)]
        stops = stop_ids(bundle, renderer)
        writer = Writer(max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        answered: list[dict[str, Any]] = []
        mine = ctx.team.share(batches)
        with ctx.report.task("write long answers", sum(map(len, mine)), unit="rows") as task:
            for batch in mine:
                outputs = writer.generate(bundle, [ids for _, _, ids in batch], stops, ctx.seed)
                for (record, required, _), ids in zip(batch, outputs, strict=True):
                    words = [token for token in ids if token not in stops]
                    output = bundle.tokenizer.decode(words, skip_special_tokens=True).strip()
                    answered.append(
                        {
                            "id": record.id,
                            "output": output,
                            "required": required,
                            "length": text_length(output),
                            "score": length_score(text_length(output), required),
                            "finished": float(bool(ids) and ids[-1] in stops),
                        }
                    )
                task.advance(len(batch))
        predictions = sorted((row for part in ctx.team.collect(answered) for row in part), key=lambda row: row["id"])
        metrics = {
            "length_score": Metric.mean(row["score"] for row in predictions),
            "finished": Metric.mean(row["finished"] for row in predictions),
        }
        return Evaluation(metrics, predictions)

    def _demands(self, ctx: Context) -> list[tuple[Record, int]]:
        """The first held-out rows that state exactly one length, with it. Raises ConfigError if there are none."""
        ids = np.zeros(0, np.int64) if ctx.heldout is None else np.asarray(ctx.heldout.ids)
        if ctx.heldout_tokens is not None:  # rows that the preflight dropped stay out here too
            ids = ids[np.isin(ids, ctx.heldout_tokens.record)]
        found: list[tuple[Record, int]] = []
        for id in ids.tolist():
            assert ctx.heldout is not None
            record = ctx.heldout[id]
            asked = "\n".join(message.content for message in record.prompt if message.role == "user")
            demands = demanded_lengths(asked, self.patterns)
            if len(demands) == 1 and record.kind in ("sft", "prompts"):
                found.append((record, demands.pop()))
        if not found:
            raise ConfigError(
                f"eval=length_score has no rows: none of {len(ids)} held-out prompts states exactly one length",
                todo="Set data.heldout_path to such prompts, or leave out this evaluator.",
            )
        return found[: self.rows]
