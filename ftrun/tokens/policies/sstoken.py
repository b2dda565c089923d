"""Tokens chosen by what the model has learned of them and by how much they look at the prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ftrun.errors import ConfigError, DataError
from ftrun.models.wrappers import adds_virtual_tokens
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.reference import own_scoring
from ftrun.tokens.step_ranking import ranks

if TYPE_CHECKING:
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context
    from ftrun.training.view import StepView

HISTORY = "history_nll"  # remembered: loss under the model before training


@register("tokens", "sstoken")
@dataclass
class SsToken(TokenPolicy):
    """Self-modulated and semantic-aware token selection (Qin et al., 2026, arXiv:2510.18250).

    REL = nll under the model before training - nll now: large where the model has already improved. In each sample
    R = (REL - min) / (max - min + 1e-8), and A is the attention of a response token to the prompt, mean over the heads
    of one layer. The ``ceil(rho * n)`` of the sample's n response tokens with the highest gamma R + (1 - gamma) A are
    trained, and the loss is their mean. Early on nothing has been learned yet and A alone decides.
    """

    gamma: float = 0.5  # weight of R against A
    rho: float = 0.6  # share of the response tokens of a sample that is trained
    layer: int = -1  # decoder layer whose attention counts; negative from the end
    warmup_samples: float = 0.2  # rows trained with gamma=0 first: a share of the run's, or from 1 on their number

    needs: ClassVar[dict[str, str]] = {
        "token_loss": "leaves tokens out of the loss",
        "whole_weights": "computes the attention of one layer once more, apart from the others",
    }
    remembers: ClassVar[bool] = True
    dynamic: ClassVar[bool] = True
    whole_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.rho <= 1:
            raise ConfigError(f"tokens.rho is a share above 0 and up to 1, not {self.rho}", f"tokens.rho={self.rho}")
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"tokens.gamma lies between 0 and 1, {self.gamma} does not", f"tokens.gamma={self.gamma}")
        if not 0 <= self.warmup_samples < math.inf:
            raise ConfigError(
                "tokens.warmup_samples must not be negative", f"tokens.warmup_samples={self.warmup_samples}"
            )

    def watched_layer(self) -> int | None:
        return self.layer if self.gamma < 1 or self.warmup_samples > 0 else None

    def remember(self, table: TokenTable, ctx: Context) -> dict[str, np.ndarray]:
        """Losses of all trained tokens before training. Raises DataError where attention counts and no row has a prompt."""
        second = table.offsets[:-1][table.lengths > 1] + 1  # the first token that could be trained
        if self.watched_layer() is not None and (np.asarray(table.loss_weight)[second] > 0).all():
            raise DataError(
                "sstoken looks at attention to the prompt, and no row has one",
                "data.path",
                "Use rows with prompts and responses and data.train_on=responses, or losses alone: "
                "tokens.gamma=1 tokens.warmup_samples=0.",
            )
        history = own_scoring(ctx)
        self._check_layer(history.bundle)  # before a long pass
        losses = history.token_nll(table, "score with the model")
        history.discard()
        return {HISTORY: losses}

    def attach(self, bundle: Bundle, ctx: Context) -> nn.Module | None:
        """Adds nothing: refuses a model whose attention to the prompt cannot be read."""
        self._batch_size = ctx.settings.train.batch_size
        self._check_layer(bundle)
        if adds_virtual_tokens(bundle.model):
            raise ConfigError(
                "sstoken reads attention to the prompt; this adapter puts virtual tokens before it",
                f"adapter={ctx.settings.choice('adapter')}",
                "Use adapter=lora.",
            )
        return None

    def _check_layer(self, bundle: Bundle) -> None:
        layers = len(bundle.architecture.layers)
        if not -layers <= self.layer < layers:
            raise ConfigError(
                f"{bundle.path} has {layers} layers", f"tokens.layer={self.layer}", f"Use -{layers} to {layers - 1}."
            )

    def statistic(self, view: StepView) -> Tensor:
        """Trained tokens of a micro-batch, and how many of them are kept, (2,)."""
        tokens = torch.bincount(view.batch.target_sequence, minlength=view.batch.sequences)
        return torch.stack([tokens.sum(), self.quota(tokens).sum()]).float()

    def weigh(self, view: StepView) -> Tensor:
        """The same factor for all tokens of the step that are kept, so that the loss is their mean; 0 for the others."""
        assert view.step_statistics is not None
        tokens, kept = view.step_statistics.view(-1, 2).sum(dim=0).tolist()
        sequence = view.batch.target_sequence
        quota = self.quota(torch.bincount(sequence, minlength=view.batch.sequences))
        places = ranks(sequence.cpu().numpy(), -self.scores(view).double().cpu().numpy())
        stays = torch.from_numpy(places).to(sequence) < quota[sequence]
        return stays.to(view.token_nll.dtype) * (tokens / max(kept, 1))

    def quota(self, tokens: Tensor) -> Tensor:
        """``ceil(rho * n)`` of these numbers of tokens."""
        return (self.rho * tokens.double() - 1e-9).ceil().long()  # 0.55 * 100 is 55.00000000000001

    def scores(self, view: StepView) -> Tensor:
        """gamma R + (1 - gamma) A of every trained token, (tokens,)."""
        gamma = 0.0 if self.warms_up(view.step, view.steps) else self.gamma
        scores = torch.zeros_like(view.token_nll.detach())
        if gamma > 0:
            learned = view.batch.remembered_targets(HISTORY) - view.token_nll.detach()  # REL
            scores += gamma * scaled(learned, view.batch.target_sequence, view.batch.sequences)
        if gamma < 1:
            batch = view.batch
            prompt = (batch.sequence >= 0) & ~(batch.loss_weight > 0)  # system and user turns, of all rounds so far
            scores += (1 - gamma) * view.attention_to(prompt)
        return scores

    def warms_up(self, step: int, steps: int) -> bool:
        if self.warmup_samples < 1:
            return step < self.warmup_samples * steps
        return step * self._batch_size < self.warmup_samples


def scaled(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Each value between the lowest and the highest of its group, 0 to 1; 0 where they are equal."""
    lowest = torch.full((groups,), math.inf, device=values.device, dtype=values.dtype)
    highest = lowest.neg().scatter_reduce(0, group, values, "amax")
    lowest = lowest.scatter_reduce(0, group, values, "amin")
    return (values - lowest[group]) / (highest[group] - lowest[group] + 1e-8)
