"""Dynamic fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy
from ftrun.training.view import StepView


@register("tokens", "dft")
@dataclass
class Dft(TokenPolicy):
    """Each token's loss times the probability that the model gives to it (Wu et al., 2025, arXiv:2508.05629).

    loss = mean of sg[p_t] * nll_t over the trained tokens, sg without gradient. Plain fine-tuning is a policy gradient
    whose reward is 1 / p_t: the less likely a token, the harder it pulls. The factor cancels that.
    """

    power: float = 1.0  # weight = p ** power; 1 is the paper's, 0 plain training

    needs: ClassVar[dict[str, str]] = {"token_loss": "weighs the loss of every token"}
    dynamic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.power < math.inf:
            raise ConfigError(f"tokens.power must not be negative or endless, not {self.power}", "tokens=dft")

    def weigh(self, view: StepView) -> Tensor:
        return (-self.power * view.token_nll.detach()).exp()
