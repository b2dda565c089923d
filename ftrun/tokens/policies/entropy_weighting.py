"""Weights from how unsure the model is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.step_ranking import keep_highest, ranked
from ftrun.training.view import StepView


@register("tokens", "entropy_weighting")
@dataclass
class EntropyWeighting(TokenPolicy):
    """Trains where the model is unsure, or where it is sure (after Wang et al., 2025, arXiv:2506.01939).

    H_t is the entropy in nats of the prediction of token t, without gradient, by the model being trained.

    - ``top``: only the ``share`` of the optimiser step's trained tokens with the highest H_t is trained, the forks of
      a text; ``share=1`` is plain training.
    - ``up``: w_t = (1 + H_t) ** strength. ``down``: w_t = (1 + H_t) ** -strength. ``strength=0`` is plain training.

    In all forms the weights are divided by their mean over the trained tokens of the step, so that the size of the
    loss stays what it was.
    """

    form: Literal["top", "up", "down"] = "top"  # train unsure tokens only; weigh unsure tokens more; or less
    share: float = 0.2  # share of the trained tokens of a step that is kept (top)
    strength: float = 1.0  # power of 1 + entropy (up, down)

    needs: ClassVar[dict[str, str]] = {"token_loss": "weighs the loss of every token"}
    dynamic: ClassVar[bool] = True
    whole_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(
                f"tokens.share is a share above 0 and up to 1, not {self.share}", f"tokens.share={self.share}"
            )
        if not 0 <= self.strength < math.inf:
            raise ConfigError(
                f"tokens.strength must not be negative or endless, not {self.strength}",
                f"tokens.strength={self.strength}",
            )

    def statistic(self, view: StepView) -> Tensor:
        """For ``top`` the entropies of all tokens, to be ranked; else sum and count of the weights, (2,)."""
        if self.form == "top":
            return ranked(view, view.token_entropy)
        weights = self.raw(view.token_entropy.double())
        return torch.stack([weights.sum(), weights.new_tensor(float(len(weights)))])

    def weigh(self, view: StepView) -> Tensor:
        assert view.step_statistics is not None
        if self.form == "top":
            return keep_highest(view, self.share)
        total, count = view.step_statistics.view(-1, 2).sum(dim=0)
        return (self.raw(view.token_entropy.double()) * (count / total)).to(view.token_nll)

    def raw(self, entropy: Tensor) -> Tensor:
        """Weights before they are divided by their mean, (tokens,)."""
        return (1 + entropy) ** (self.strength if self.form == "up" else -self.strength)
