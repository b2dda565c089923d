"""Which tokens of a tuned model's answers its base model would not have written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ftrun.runs.artifacts import write_json
from ftrun.data.batches import collate
from ftrun.data.render import Renderer
from ftrun.data.tokens import Sequence as TokenSequence
from ftrun.data.tokens import TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.base import Evaluation, Evaluator, Metric
from ftrun.evaluation.evaluators.generation import Generation, heldout_prompts, stop_ids
from ftrun.evaluation.evaluators.heldout import ratio
from ftrun.models.head import LOGITS_BYTES
from ftrun.models.load import load_bundle
from ftrun.registry import register
from ftrun.tokens.reference import load_reference

if TYPE_CHECKING:
    from ftrun.runs.context import Context
    from ftrun.data.records import Record
    from ftrun.models.bundle import Bundle

PARTS = ((0, 5), (5, 20), (20, 100), (100, None))  # positions of an answer that are counted together
MOST_FREQUENT = 30  # shifted tokens that are listed


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


@register("eval", "token_shift")
@dataclass
class TokenShift(Evaluator):
    """How far tuning has moved the choice of tokens (Lin et al., 2024, arXiv:2312.01552).

    The tuned model answers held-out prompts greedily, in its own template. The base model reads the same answer, and
    each token has a rank in what the base would say there: 1 is ``unshifted``, 2 or 3 ``marginal``, more ``shifted``;
    the three are shares of all tokens and add up to 1. ``kl`` is the mean of KL(tuned || base) and ``base_probability``
    that of the token's probability under the base. Shares by position and the most frequent shifted tokens are in
    eval/token_shift.json. The token that ends the answer is left out: a plain text has none.
    """

    base: str | None = None  # untuned model: folder, hub id or run folder; null: the model that the run started from
    context: Literal["plain", "same"] = (
        "plain"  # what the base reads before the answer: the bare query, or the template
    )
    rows: int = 16  # held-out rows to answer, the first ones
    max_new_tokens: int = 128  # longest answer, in tokens
    batch_size: int = 8  # rows generated at a time

    asks_heldout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("rows", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                where = f"eval.token_shift.{name}={getattr(self, name)}"
                raise ConfigError(f"eval.token_shift.{name} must be at least 1", where)

    def evaluate(self, bundle: Bundle, ctx: Context) -> Evaluation:
        answers = self.answers(bundle, ctx, "token_shift")
        tokens = np.array([len(answer.tokens) for answer in answers])
        if not tokens.sum():
            raise DataError("eval=token_shift has nothing to compare: every answer is empty")
        metrics = {
            "unshifted": _share([answer.rank == 1 for answer in answers]),
            "marginal": _share([(answer.rank > 1) & ~answer.shifted for answer in answers], higher_is_better=False),
            "shifted": _share([answer.shifted for answer in answers], higher_is_better=False),
            "kl": _share([answer.kl for answer in answers], higher_is_better=False),
            "base_probability": _share([answer.probability for answer in answers]),
        }
        if ctx.team.rank == 0:
            write_json(ctx.out / "eval" / "token_shift.json", details(answers, bundle.tokenizer))
        return Evaluation(metrics, [_prediction(answer, bundle.tokenizer) for answer in answers])

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
        writer = Generation(max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        stops = stop_ids(bundle, renderer)
        batches = [prompts[start : start + self.batch_size] for start in range(0, len(prompts), self.batch_size)]
        mine = batches[ctx.team.rank :: ctx.team.world_size]
        found: list[Answer] = []
        with ctx.report.task("compare answers with the base", sum(map(len, mine)), unit="rows") as task:
            for batch in mine:
                written = writer.generate(bundle, [ids for _, ids in batch], stops, ctx.seed)
                for (record, ids), answer in zip(batch, written, strict=True):
                    tokens = [token for token in answer if token not in stops]
                    theirs = ids if self.context == "same" else plain_ids(record, base.tokenizer)
                    found.append(_compared(record, tokens, (bundle, ids), (base, theirs)))
                    task.advance(1)
        everyone = [answer for part in ctx.team.gather_object(found) for answer in part]
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


def details(answers: Sequence[Answer], tokenizer: Any) -> dict[str, Any]:
    """Shares by position in the answer, and the tokens that are shifted most often."""
    positions = []
    for start, end in PARTS:
        ranks = np.concatenate([answer.rank[start:end] for answer in answers])
        if len(ranks):
            shares = {"unshifted": ranks == 1, "marginal": (ranks > 1) & (ranks <= 3), "shifted": ranks > 3}
            named = {name: float(chosen.mean()) for name, chosen in shares.items()}
            positions.append({"from": start + 1, "to": end, "tokens": len(ranks), **named})
    counts = Counter(int(token) for answer in answers for token in answer.tokens[answer.shifted])
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_FREQUENT]
    shifted = [{"id": token, "token": tokenizer.decode([token]), "count": count} for token, count in ordered]
    return {"by_position": positions, "most_shifted": shifted}


def _share(values: list[np.ndarray], higher_is_better: bool = True) -> Metric:
    """Mean over all tokens, with answers as clusters."""
    counts = np.array([len(part) for part in values])
    filled = counts > 0
    totals = np.array([float(part.sum()) for part in values])
    value, error = ratio(totals[filled], counts[filled])
    return Metric(value, error, int(counts.sum()), higher_is_better)


def _prediction(answer: Answer, tokenizer: Any) -> dict[str, Any]:
    shifted = [tokenizer.decode([token]) for token in answer.tokens[answer.shifted]]
    return {
        "id": answer.id,
        "prompt": answer.prompt,
        "output": tokenizer.decode(answer.tokens),
        "tokens": len(answer.tokens),
        "shifted": shifted,
        "rank": answer.rank.astype(int).tolist(),
        "base_probability": [round(float(p), 6) for p in answer.probability],
        "kl": [round(float(kl), 6) for kl in answer.kl],
    }


def _asked(record: Record) -> str:
    return record.prompt[-1].content if record.prompt else ""
