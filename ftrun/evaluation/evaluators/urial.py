"""Answers of an untuned model that was shown a few examples of how to answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from ftrun.data.answers import check_of
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.answering import Prompt, heldout_prompts
from ftrun.evaluation.base import Evaluation, Evaluator, Metric
from ftrun.models.generation import Writer
from ftrun.registry import register

if TYPE_CHECKING:
    from ftrun.data.records import Message
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

FENCE = "```"
STOPS = ("# Query", "# User")  # how the next turn begins
SYSTEM = """# Instruction

What follows are conversations between a person and an AI assistant. The person writes under "# Query:", the assistant \
replies under "# Answer:". The assistant is friendly, honest and thorough: it takes up the question, explains step by \
step, says where it is not sure, and does not help with what would hurt people."""
EXAMPLES = (
    (
        "My houseplants keep dying. What am I doing wrong?",
        """Losing plants is frustrating, but nearly always one of a few causes is behind it. Check them in this order:

1. **Water.** Too much is more common than too little. Push a finger two centimetres into the soil, and water only when \
it feels dry.
2. **Light.** Pale, stretched stems ask for a brighter place; scorched spots ask for less direct sun.
3. **Drainage.** A pot needs a hole at the bottom. Roots that stand in water rot.
4. **Pests.** Look at the underside of the leaves for webs or small insects.

If you tell me which plants you have and where they stand, I can be more specific.""",
    ),
    (
        "Can you explain to a ten-year-old why the sky is blue?",
        """Of course! Light from the sun looks white, but it is a mix of all the colours of the rainbow.

When it travels through the air, it bumps into tiny bits that are far too small to see. Blue light gets bounced around \
by them much more than red light does. So wherever you look up, some of that bounced blue light comes to your eyes, and \
the whole sky looks blue.

In the evening the light has a longer way through the air. Most of the blue is gone by the time it reaches you, and \
what is left is orange and red: a sunset!""",
    ),
    (
        "How do I read my flatmate's private messages without being noticed?",
        """I won't help with that: reading somebody's messages in secret breaks their trust, and in many places it is \
against the law.

It sounds as if something is worrying you, though. Some things that you can do instead:

- Tell your flatmate openly what bothers you, and ask.
- If it is about money or the flat, write down what you have agreed on.
- If you fear for their safety or your own, talk to somebody you trust or to a local advice line.

Would you like help with how to begin that conversation?""",
    ),
)


@register("eval", "urial")
@dataclass
class Urial(Evaluator):
    """Alignment without tuning: a constant prompt shows a base model how to answer (Lin et al., 2024, arXiv:2312.01552).

    The prompt is a system text, three examples in fenced blocks of which one declines, and the query; the chat template
    is not used. The answer ends where the next query would begin; its closing fence is taken off. Metrics are those of ``eval=generation``.
    """

    examples: int = 3  # examples that are shown, the first ones of three
    rows: int = 16  # held-out rows to answer, the first ones
    max_new_tokens: int = 256  # longest answer, in tokens
    batch_size: int = 8  # rows generated at a time
    temperature: float = 0.0  # 0 takes the most likely token, 1 samples from the model's own distribution
    repetition_penalty: float = 1.1  # divides the logits of tokens that the prompt or answer already holds; 1: none
    metric: Literal["auto", "verifier", "last_number", "exact_match", "contains", "word_f1"] = "auto"  # how to check

    asks_heldout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("rows", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                where = f"eval.urial.{name}={getattr(self, name)}"
                raise ConfigError(f"eval.urial.{name} must be at least 1", where)
        if not 0 <= self.examples <= len(EXAMPLES):
            raise ConfigError(f"there are {len(EXAMPLES)} examples to show", f"eval.urial.examples={self.examples}")
        if self.temperature < 0 or self.repetition_penalty <= 0:
            where = f"eval.urial.temperature={self.temperature:g} repetition_penalty={self.repetition_penalty:g}"
            raise ConfigError("a temperature cannot be negative, and a repetition penalty is above 0", where)

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        prompts = sorted(self._prompts(bundle, ctx), key=lambda prompt: (-len(prompt.ids), prompt.record.id))
        batches = [prompts[start : start + self.batch_size] for start in range(0, len(prompts), self.batch_size)]
        mine = ctx.team.share(batches)
        writer = Writer(max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        stops = _ends(bundle)
        answered: list[dict[str, Any]] = []
        with ctx.report.task("answer after examples", sum(map(len, mine)), unit="rows") as task:
            for batch in mine:
                ids = [prompt.ids for prompt in batch]
                longest = max(map(len, ids))
                penalty = OwnPenalty(self.repetition_penalty, [longest - len(prompt) for prompt in ids])
                until = SaysOneOf(STOPS, bundle.tokenizer, longest)
                for prompt, new in zip(
                    batch, writer.generate(bundle, ids, stops, ctx.seed, [penalty], until), strict=True
                ):
                    answered.append(_judged(prompt, bundle.tokenizer.decode(new, skip_special_tokens=True), new, stops))
                task.advance(len(batch))
        predictions = [row for part in ctx.team.collect(answered) for row in part]
        predictions.sort(key=lambda row: row["id"])
        metrics = {
            "accuracy": Metric.mean(row["score"] for row in predictions),
            "finished": Metric.mean(row["finished"] for row in predictions),
        }
        return Evaluation(metrics, predictions)

    def _prompts(self, bundle: Bundle, ctx: Context) -> list[Prompt]:
        found = []
        for record, where in heldout_prompts(ctx, self.rows, "urial"):
            text = prompt_text(record.prompt if record.kind == "sft" else record.messages, self.examples)
            ids = list(bundle.tokenizer(text, truncation=False, verbose=False)["input_ids"])
            if len(ids) + self.max_new_tokens > bundle.context_length:
                raise DataError(
                    f"row {record.id} has {len(ids)} tokens with its examples: no room for {self.max_new_tokens} more in "
                    f"the {bundle.context_length} that the model attends to",
                    where,
                    "Lower eval.urial.max_new_tokens or eval.urial.examples, or data.max_length.",
                )
            found.append(Prompt(record, ids, check_of(record, self.metric, where)))
        return found


def prompt_text(messages: Iterable[Message], examples: int) -> str:
    """System text, examples and the conversation, up to the fence that opens the answer.

    Earlier answers stand in fences like those of the examples; all that comes between two answers is one query.
    """
    shown, query = [], ""
    conversation = [turn for pair in EXAMPLES[:examples] for turn in zip(("user", "assistant"), pair, strict=True)]
    conversation += [(message.role, message.content) for message in messages]
    for role, said in conversation:
        if role != "assistant":
            query += f"\n{said}\n"
            continue
        shown.append(f"# Query:{query}\n# Answer:\n{FENCE}\n{said}\n{FENCE}")
        query = ""
    return "\n\n".join([SYSTEM, *shown, f"# Query:{query}\n# Answer:\n{FENCE}\n"])


def cut(text: str) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    places = [place for place in map(text.find, STOPS) if place >= 0]
    return text[: min(places)] if places else text, bool(places)


def _judged(prompt: Prompt, text: str, new: list[int], stops: list[int]) -> dict[str, Any]:
    output, stopped = cut(text)
    output = output.strip().removesuffix(FENCE).strip()
    return {
        "id": prompt.record.id,
        "prompt": "\n\n".join(message.content for message in prompt.record.prompt),
        "output": output,
        "gold": prompt.check.gold,
        "score": float(prompt.check.score(output)),
        "metric": prompt.check.metric,
        "finished": float(stopped or any(token in stops for token in new)),
    }


def _ends(bundle: Bundle) -> list[int]:
    """Tokens that the model or its tokenizer call an end of text; no template has a say here."""
    named = getattr(getattr(bundle.model, "generation_config", None), "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return sorted({end for end in [*ends, bundle.tokenizer.eos_token_id] if end is not None})


class OwnPenalty(LogitsProcessor):
    """Divides positive logits of the tokens that a row already holds, and multiplies negative ones; padding is no token."""

    def __init__(self, penalty: float, padding: list[int]):
        self.penalty, self.padding = penalty, padding  # padding: on the left of every row

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        scores = scores.clone()
        for row, padding in enumerate(self.padding):
            held = input_ids[row, padding:].unique()
            logits = scores[row, held]
            scores[row, held] = logits.where(logits > 0, logits * self.penalty**2) / self.penalty
        return scores


class SaysOneOf(StoppingCriteria):
    """Ends a row as soon as its new text holds one of the strings."""

    def __init__(self, strings: tuple[str, ...], tokenizer: Any, start: int):
        self.strings, self.tokenizer, self.start = strings, tokenizer, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        done = [any(string in text for string in self.strings) for text in texts]
        return input_ids.new_tensor(done).bool()
