"""Token-adaptive loss re-weighting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy
from ftrun.training.view import StepView

LOWEST_TAU = 1e-6
LOWEST_PROBABILITY = 1e-6


@register("tokens", "talr")
@dataclass
class Talr(TokenPolicy):
    """Trust easy tokens, dampen surprising ones (Lin et al., 2025, arXiv:2509.20758).

    Each trained token gets ``w = max(p ** (1 / tau), minimum_weight)``, where ``p`` is the probability that the model
    being trained gives to the gold token and ``tau`` is the median over the sequences of the optimiser step of their
    mean token loss (the lower of two middle ones). Hard tokens pull the model away from what it knows; they keep a
    small say. The loss is divided by the number of trained tokens, or with ``normalize=simplex`` by the sum of ``w``.
    """

    tau: float | None = None  # temperature; null: the median of every step, which falls as the model learns
    minimum_weight: float = 0.01  # no token weighs less
    normalize: Literal["tokens", "simplex"] = "tokens"  # divisor of the loss: number of tokens, or sum of the weights

    needs: ClassVar[dict[str, str]] = {"token_loss": "weighs the loss of every token"}
    dynamic: ClassVar[bool] = True
    whole_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tau is not None and not self.tau > 0:
            raise ConfigError(
                f"tokens.tau must lie above 0, not be {self.tau}",
                f"tokens.tau={self.tau}",
                "tokens.tau=null takes the median of every step.",
            )
        if not 0 <= self.minimum_weight <= 1:
            raise ConfigError(
                f"tokens.minimum_weight lies between 0 and 1, {self.minimum_weight} does not",
                f"tokens.minimum_weight={self.minimum_weight}",
            )

    def statistic(self, view: StepView) -> Tensor:
        """Mean losses of the sequences, (sequences,); for the simplex the losses of all tokens too.

        The latter are pairs, flattened: (mean loss, 1) for a sequence, (loss, 0) for a token.
        """
        nll = view.token_nll.detach()
        means = view.per_sequence_mean(nll)
        if self.normalize == "tokens":
            return means
        marks = torch.cat([torch.ones_like(means), torch.zeros_like(nll)])
        return torch.stack([torch.cat([means, nll]), marks], dim=1).flatten()

    def weigh(self, view: StepView) -> Tensor:
        assert view.step_statistics is not None
        step = view.step_statistics
        if self.normalize == "tokens":
            return self.weights(view.token_nll.detach(), step)
        values, marks = step.view(-1, 2).unbind(dim=1)
        means, all_nll = values[marks == 1], values[marks == 0]
        return self.weights(view.token_nll.detach(), means) / self.weights(all_nll, means).mean()

    def weights(self, nll: Tensor, sequence_means: Tensor) -> Tensor:
        """``w`` of tokens with these losses in a step of sequences with these mean losses."""
        tau = self.tau
        if tau is None:
            tau = sequence_means.median().clamp(min=LOWEST_TAU)  # the lower middle for even counts
        p = (-nll).exp().clamp(min=LOWEST_PROBABILITY)
        return (p ** (1 / tau)).clamp(min=self.minimum_weight)
