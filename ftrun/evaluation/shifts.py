"""Answers of a tuned model, and what its base says of every token of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ftrun.data.batches import collate
from ftrun.data.render import Renderer
from ftrun.data.tokens import Sequence as TokenSequence
from ftrun.data.tokens import TokenTable
from ftrun.errors import DataError
from ftrun.evaluation.answering import heldout_prompts
from ftrun.models.generation import Writer, stop_ids
from ftrun.models.head import LOGITS_BYTES
from ftrun.models.load import load_bundle
from ftrun.tokens.reference import load_reference

if TYPE_CHECKING:
    from ftrun.data.records import Record
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@dataclass
class Answer:
    """What a tuned model wrote, and what its base says of every token of it."""

    id: int
    prompt: str
    tokens: np.ndarray  # (tokens,) without the end of the turn
    rank: np.ndarray  # (tokens,) of the token in the base's distribution, from 1
    kl: np.ndarray  # (tokens,) KL(tuned || base) of the distributions that the token comes from, in nats
    probability: np.ndarray  # (tokens,) of the token under the base

    @property
    def shifted(self) -> np.ndarray:
        """Tokens that are none of the base's three best, (tokens,) bool."""
        return self.rank > 3


@dataclass
class Comparison:
    """How answers are written and compared: the base model, what it reads, and how much is written."""

    base: str | None
    context: Literal["plain", "same"]
    rows: int
    max_new_tokens: int
    batch_size: int

    def answers(self, bundle: Bundle, ctx: Context, evaluator: str) -> list[Answer]:
        """Answers of the model in ``bundle`` with the base's ranks, by row; the same on all processes.

        Rows are written in batches and compared one by one, so the batch size cannot move a rank. Raises DataError for
        a prompt that is too long.
        """
        base = self._base(bundle, ctx)
        renderer = Renderer(bundle.tokenizer)
        prompts = [
            (record, renderer.prompt_ids(record, where)) for record, where in heldout_prompts(ctx, self.rows, evaluator)
        ]
        prompts.sort(key=lambda prompt: (-len(prompt[1]), prompt[0].id))
        self._check_room(prompts, min(bundle.context_length, base.context_length))
        writer = Writer(self.max_new_tokens)
        stops = stop_ids(bundle, renderer)
        batches = [prompts[start : start + self.batch_size] for start in range(0, len(prompts), self.batch_size)]
        mine = ctx.team.share(batches)
        found: list[Answer] = []
        with ctx.report.task("compare answers with the base", sum(map(len, mine)), unit="rows") as task:
            for batch in mine:
                written = writer.generate(bundle, [ids for _, ids in batch], stops, ctx.seed)
                for (record, ids), answer in zip(batch, written, strict=True):
                    tokens = [token for token in answer if token not in stops]
                    theirs = ids if self.context == "same" else plain_ids(record, base.tokenizer)
                    found.append(_compared(record, tokens, (bundle, ids), (base, theirs)))
                    task.advance(1)
        everyone = [answer for part in ctx.team.collect(found) for answer in part]
        return sorted(everyone, key=lambda answer: answer.id)

    def _base(self, bundle: Bundle, ctx: Context) -> Bundle:
        if self.base is not None:
            return load_reference(self.base, bundle, ctx)
        if "train" not in ctx.settings.stages and ctx.settings.run is None:
            ctx.report.warn(
                "nothing was trained here, so the model is compared with itself: name another with "
                "eval.token_shift.base or eval.borrowed_tokens.base"
            )
        quant = ctx.settings.component("quant")
        return load_bundle(ctx.settings.model, task="causal", quant=quant, device=ctx.team.device)

    def _check_room(self, prompts: list[tuple[Record, list[int]]], context_length: int) -> None:
        record, ids = prompts[0]
        if len(ids) + self.max_new_tokens > context_length:
            raise DataError(
                f"row {record.id} has a prompt of {len(ids)} tokens: no room for {self.max_new_tokens} more in the "
                f"{context_length} that the models attend to",
                todo="Lower max_new_tokens of the evaluator, or data.max_length to leave out such rows.",
            )


def plain_ids(record: Record, tokenizer: Any) -> list[int]:
    """The messages before the response as bare text, an empty line after each."""
    messages = record.prompt if record.kind == "sft" else record.messages
    text = "".join(f"{message.content}\n\n" for message in messages)
    return list(tokenizer(text, truncation=False, verbose=False)["input_ids"])


@torch.no_grad()
def _compared(
    record: Record, tokens: list[int], tuned: tuple[Bundle, list[int]], base: tuple[Bundle, list[int]]
) -> Answer:
    """What the base says of the tokens, each model after a prompt of its own."""
    nothing = np.zeros(0)
    if not tokens:
        return Answer(record.id, _asked(record), np.zeros(0, np.int64), nothing, nothing, nothing)
    ours, theirs = (_predicting(bundle, prompt, tokens) for bundle, prompt in (tuned, base))
    heads = [bundle.architecture.head(bundle.model) for bundle, _ in (tuned, base)]
    at_once = max(1, LOGITS_BYTES // (4 * 4 * max(1, heads[1].vocabulary)))
    targets = torch.tensor(tokens, device=ours.device)
    parts = [
        shift(heads[0].logits(a), heads[1].logits(b), ids)
        for a, b, ids in zip(ours.split(at_once), theirs.split(at_once), targets.split(at_once), strict=True)
    ]
    rank, kl, probability = (torch.cat(values).cpu().numpy() for values in zip(*parts, strict=True))
    return Answer(record.id, _asked(record), np.array(tokens), rank, kl, probability)


def shift(tuned: Tensor, base: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rank of each target in the base's logits, KL(tuned || base), and the target's probability under the base.

    Logits are (tokens, vocabulary), of which the shorter vocabulary counts where they differ by padding; the results
    (tokens,).
    """
    size = min(tuned.shape[1], base.shape[1])
    log_tuned, log_base = (logits[:, :size].float().log_softmax(1) for logits in (tuned, base))
    gold = log_base.gather(1, targets[:, None])
    rank = 1 + (log_base > gold).sum(1)
    kl = (log_tuned.exp() * (log_tuned - log_base)).sum(1)
    return rank, kl, gold.squeeze(1).exp()


def _predicting(bundle: Bundle, prompt: list[int], tokens: list[int]) -> Tensor:
    """Final hidden states from which the tokens after the prompt are predicted, (tokens, width)."""
    ids = np.array([*prompt, *tokens], np.int32)
    table = TokenTable.from_sequences([TokenSequence(ids, np.ones(len(ids), np.float32), 0)])
    batch = collate(table, [[0]], bundle.pad_id).to(bundle.device)
    states = bundle.architecture.hidden_states(bundle.model, batch)[0]
    return states[len(prompt) - 1 : len(ids) - 1]


def _asked(record: Record) -> str:
    return record.prompt[-1].content if record.prompt else ""
