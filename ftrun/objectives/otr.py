"""One-token rollout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ftrun.data.batches import Batch
from ftrun.errors import ConfigError
from ftrun.models.head import (
    Head,
    accurate_dtype,
    add_gradients_,
    chunk_logits,
    logits_space,
    row_chunks,
    slope_of_cap,
)
from ftrun.objectives.base import Kind, Objective
from ftrun.registry import register
from ftrun.training.parts import Loss
from ftrun.training.view import StepView

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context


@register("objective", "otr")
@dataclass
class Otr(Objective):
    """Every response token as a policy gradient of one step (Ming et al., 2025, arXiv:2509.26313).

    At the position of gold token x, K tokens a_j are drawn from pi' = softmax(logits / kappa). Their reward is R_j = 1
    where a_j = x, else beta. The token's loss is -(1/K) sum_j R_j log pi(a_j), pi = softmax(logits); nothing has a
    gradient but log pi. ``rollouts=exact`` takes the mean over all draws in closed form:
    -[pi'(x) log pi(x) + beta * sum of pi'(a) log pi(a) over a != x]. With kappa = 1 its gradient is (1 - beta) pi(x)
    times that of plain fine-tuning, so that beta = 0 is `tokens=dft`.

    Losses are averaged over the tokens of a sequence, then over the sequences. Weights of a token policy count. The
    draws of a sequence follow from the seed, the optimiser step and its place in the data.
    """

    rollouts: Literal["sampled", "exact"] = "sampled"  # draw tokens, or their mean in closed form
    candidates: int = 256  # tokens drawn at every position (K; sampled)
    temperature: float = 1.3  # of the draws (kappa); above 1 they are more varied
    beta: float = -0.1  # reward of a drawn token that is not the gold one
    average: Literal["sequence", "token"] = "sequence"  # token: one mean over all tokens of a step, as objective=sft

    kind: ClassVar[Kind] = "sft"
    packs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ConfigError(
                f"objective.candidates is a number of tokens, not {self.candidates}",
                f"objective.candidates={self.candidates}",
            )
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"objective.temperature must lie above 0, not be {self.temperature}",
                f"objective.temperature={self.temperature}",
            )
        if not -math.inf < self.beta < 1:
            raise ConfigError(
                f"objective.beta lies below 1, the reward of the gold token, and is not {self.beta}",
                f"objective.beta={self.beta}",
            )
        self._seed = 0

    def attach(self, bundle: Bundle, ctx: Context) -> nn.Module | None:
        self._seed = ctx.seed
        return None

    def count(self, batch: Batch) -> float:
        return float(batch.trained_tokens if self.average == "token" else len(batch.target_sequence.unique()))

    def loss(self, view: StepView) -> Loss:
        head = view.architecture.head(view.model)
        chances = self._chances(view) if self.rollouts == "sampled" else None
        each = self._each(view)
        sums = self._sums_by_autograd if head.weight is None else self._sums
        total, nll, share = sums(head, view.hidden, view.batch.target_ids, chances, each * view.weights)
        return Loss(total, {"nll": (each * nll.detach()).sum(), "gold_share": (each * share.detach()).sum()})

    def _sums(
        self, head: Head, hidden: Tensor, gold: Tensor, chances: Tensor | None, factors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the losses times ``factors``; nll and share of every gold token, (tokens,) each, without gradient."""
        device, grad = hidden.device.type, torch.is_grad_enabled()
        hidden, weight = head.inputs(hidden)
        with torch.autocast(device, enabled=False):
            return _SummedRollouts.apply(hidden, weight, head.bias, head, gold, chances, factors.detach(), self, grad)

    def _sums_by_autograd(
        self, head: Head, hidden: Tensor, gold: Tensor, chances: Tensor | None, factors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same through a head that can only be called: each chunk is computed again in the backward."""
        parts = [
            checkpoint(
                self._rollout,
                head,
                hidden[rows],
                gold[rows],
                None if chances is None else chances[rows],
                use_reentrant=False,
            )
            for rows in row_chunks(len(gold), head.vocabulary, accurate_dtype(hidden.dtype).itemsize, buffers=4)
        ]
        losses, nll, share = (torch.cat(part) for part in zip(*parts, strict=True)) if parts else (hidden.sum(1),) * 3
        return (factors * losses).sum(), nll, share

    def _rollout(
        self, head: Head, hidden: Tensor, gold: Tensor, chances: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, nll of the gold token, and its share among the draws, of a chunk of positions, (n,) each."""
        logits = head.logits(hidden)
        logits = logits.to(accurate_dtype(logits.dtype))
        gold = gold.unsqueeze(1)
        log_total = logits.logsumexp(1)
        log_gold = logits.gather(1, gold).squeeze(1) - log_total  # log pi(x)
        drawing = (logits.detach() / self.temperature).softmax(1)  # pi'
        if chances is None:
            share = drawing.gather(1, gold).squeeze(1)
            log_all = (drawing * logits).sum(1) - log_total  # sum of pi'(a) log pi(a)
            return -(share * log_gold + self.beta * (log_all - share * log_gold)), -log_gold, share
        drawn = draw_(drawing, chances)
        hit = drawn == gold
        reward = torch.where(hit, 1.0, self.beta)
        log_drawn = logits.gather(1, drawn) - log_total.unsqueeze(1)  # log pi(a_j)
        return -(reward * log_drawn).mean(1), -log_gold, hit.to(logits.dtype).mean(1)

    def losses_and_gradient_(
        self, logits: Tensor, gold: Tensor, chances: Tensor | None, space: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `_rollout` gives; the gradient of the loss by the logits takes their place. ``space``: as large as they."""
        gold = gold.unsqueeze(1)
        logits.sub_(logits.amax(1, keepdim=True))
        log_gold = logits.gather(1, gold)  # log pi(x), once log_total is off it
        drawing = torch.div(logits, self.temperature, out=space).exp_()  # pi', before it is divided by its sum
        if chances is None:
            mass = drawing.sum(1, keepdim=True)
            share = drawing.gather(1, gold) / mass
            mean = torch.linalg.vecdot(drawing, logits).unsqueeze(1) / mass  # sum of pi'(a) logit(a)
            total = logits.exp_().sum(1, keepdim=True)
            log_total = total.log()
            log_gold -= log_total
            loss = -((1 - self.beta) * share * log_gold + self.beta * (mean - log_total))
            # (sum of w) pi - w, where w(a) = pi'(a) R(a)
            logits.mul_((self.beta + (1 - self.beta) * share) / total).sub_(drawing.mul_(self.beta / mass))
            logits.scatter_add_(1, gold, (self.beta - 1) * share)
        else:
            drawn = draw_(drawing, chances)
            hit = drawn == gold
            share = hit.to(logits.dtype).mean(1, keepdim=True)
            reward = torch.where(hit, 1.0, self.beta).to(logits.dtype)
            log_drawn = logits.gather(1, drawn)
            total = logits.exp_().sum(1, keepdim=True)
            log_total = total.log()
            log_gold -= log_total
            loss = -(reward * (log_drawn - log_total)).mean(1, keepdim=True)
            # (1/K) [(sum_j R_j) pi - sum_j R_j onehot(a_j)]
            logits.mul_(reward.mean(1, keepdim=True) / total).scatter_add_(1, drawn, reward / -reward.shape[1])
        return loss.squeeze(1), -log_gold.squeeze(1), share.squeeze(1)

    def _each(self, view: StepView) -> Tensor:
        """What each token's loss counts before its weight, (tokens,): 1, or 1 / T."""
        ones = torch.ones_like(view.batch.target_weights)
        if self.average == "token":
            return ones
        return (1 / view.per_sequence_sum(ones))[view.batch.target_sequence]

    def _chances(self, view: StepView) -> Tensor:
        """Evenly spread numbers from 0 to 1, one a draw, (tokens, K)."""
        batch = view.batch
        device = batch.target_ids.device
        trained = torch.bincount(batch.target_sequence, minlength=batch.sequences).tolist()
        found = []
        for index, count in zip(batch.table_index.tolist(), trained, strict=True):
            state = np.random.SeedSequence([self._seed, view.step, index]).generate_state(2).tolist()
            generator = torch.Generator(device).manual_seed(state[0] << 31 | state[1] >> 1)
            found.append(torch.rand(count, self.candidates, generator=generator, device=device))
        return torch.cat(found)


class _SummedRollouts(torch.autograd.Function):
    """What a token's loss counts is known before it, so the forward finishes all gradients while it has the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        gold: Tensor,
        chances: Tensor | None,
        factors: Tensor,
        objective: Otr,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        accurate = accurate_dtype(hidden.dtype)
        losses, nll, share = hidden.new_empty(3, len(hidden), dtype=accurate)
        of_hidden, of_weight, of_bias = (wanted and wants_gradient for wanted in ctx.needs_input_grad[:3])
        d_hidden = torch.empty_like(hidden) if of_hidden else None
        d_weight = torch.zeros_like(weight, dtype=accurate) if of_weight else None
        d_bias = torch.zeros_like(bias, dtype=accurate) if bias is not None and of_bias else None
        chunks = row_chunks(len(hidden), len(weight), accurate.itemsize, buffers=2 if head.cap is None else 3)
        space = logits_space(hidden, weight, chunks)
        second = hidden.new_empty(chunks[0].stop if chunks else 0, len(weight), dtype=accurate)
        for rows in chunks:
            logits = chunk_logits(hidden[rows], weight, bias, head.scale, head.cap, space)
            slope = slope_of_cap(logits, head.cap) if wants_gradient else None
            losses[rows], nll[rows], share[rows] = objective.losses_and_gradient_(
                logits, gold[rows], None if chances is None else chances[rows], second[: len(logits)]
            )
            if not wants_gradient:
                continue
            raw = logits if slope is None else logits.mul_(slope)
            raw.mul_((factors[rows] * head.scale).unsqueeze(1))
            add_gradients_(raw, rows, hidden, weight, d_hidden, d_weight, d_bias)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nll, share)
        return (factors * losses).sum(), nll, share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*found, None, None, None, None, None, None)


def draw_(probabilities: Tensor, chances: Tensor) -> Tensor:
    """Word numbers (n, draws) that even ``chances`` (n, draws) pick by ``probabilities`` (n, vocabulary).

    The probabilities need not sum to 1; their running sum takes their place.
    """
    below = probabilities.cumsum_(1)
    picked = torch.searchsorted(below, chances.to(below.dtype) * below[:, -1:], right=True)
    return picked.clamp_(max=probabilities.shape[1] - 1)
