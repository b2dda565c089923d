"""Calls of tools that the model writes, against the right ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftrun.data.calls import call_reward, read_call, tools_of
from ftrun.errors import ConfigError
from ftrun.evaluation.answering import Answering, Prompt
from ftrun.evaluation.base import Evaluation, Metric
from ftrun.registry import register

if TYPE_CHECKING:
    from ftrun.data.render import Renderer
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@register("eval", "tool_calls")
@dataclass
class ToolCalls(Answering):
    """Generates the last call of held-out conversations and compares it with the right one.

    ``accuracy`` is the share of calls that are right in tool, argument names and values, ``readable`` the share that is
    a call of an offered tool at all, ``right_tool`` the share that names the right one, ``reward`` the mean of the rule
    table of TL-Training (Ye et al., 2025, arXiv:2412.15495), from -2 to 1. Rows whose last turn holds no call are left
    out.
    """

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        found = super().evaluate(bundle, ctx)
        rewards = [row["reward"] for row in found.predictions]
        further = {
            "reward": Metric.mean(rewards),
            "readable": Metric.mean(float(reward > -2) for reward in rewards),
            "right_tool": Metric.mean(float(row["right_tool"]) for row in found.predictions),
        }
        return Evaluation(found.metrics | further, found.predictions)

    def _prompts(self, bundle: Bundle, renderer: Renderer, ctx: Context) -> list[Prompt]:
        prompts = super()._prompts(bundle, renderer, ctx)
        calls = [prompt for prompt in prompts if read_call(prompt.record.response) is not None]
        if not calls:
            raise ConfigError(
                f"eval=tool_calls has no rows: none of {len(prompts)} held-out rows ends with a call",
                "eval=tool_calls",
                "Calls are name(key=value) or JSON with name and arguments. Raise eval.tool_calls.rows, or leave it out.",
            )
        if len(calls) < len(prompts):
            ctx.report.note(f"{len(prompts) - len(calls)} of {len(prompts)} held-out rows end without a call: left out")
        return calls

    def _judge(self, tokenizer: Any, prompt: Prompt, ids: list[int], stops: list[int]) -> dict[str, Any]:
        row = super()._judge(tokenizer, prompt, ids, stops)
        gold, call = read_call(prompt.record.response), read_call(row["output"])
        assert gold is not None
        reward = call_reward(row["output"], gold, tools_of(prompt.record))
        further = {"reward": reward, "score": float(reward == 1), "metric": "call", "gold": prompt.record.response}
        return row | further | {"right_tool": call is not None and call.name == gold.name}
