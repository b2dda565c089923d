"""Filling in the middle with an eye on how much of it is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from ftrun.adapters.peft_adapter import seeded
from ftrun.data.batches import Batch
from ftrun.errors import ConfigError
from ftrun.objectives.base import Kind, TokenLoss
from ftrun.registry import register
from ftrun.training.parts import Loss
from ftrun.training.view import StepView

if TYPE_CHECKING:
    from ftrun.config.settings import Settings
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

HORIZON = "horizon"  # what tokens=fill_in_the_middle remembers


@register("objective", "horizon_length")
@dataclass
class HorizonLength(TokenLoss):
    """Next-token loss plus the error of a guess of the remaining length (Ding et al., 2024, arXiv:2410.03103).

    ``L = L_ntp + weight * mean_t |yhat_t - y_t|``. ``y_t = (M - t) / M`` is the horizon of the t-th of M tokens of a
    middle, ``yhat_t`` what one linear map, in float32, reads off the last hidden state there. The mean is over the
    tokens with a horizon of the whole optimiser step. The map is thrown away after training.
    """

    kind: ClassVar[Kind] = "text"

    weight: float = 0.1  # of the horizon's error (lambda)
    head_activation: Literal["sigmoid", "none"] = "sigmoid"  # what bounds the guess to 0..1

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if "fill_in_the_middle" not in settings.choices("tokens"):
            raise ConfigError(
                "objective=horizon_length learns from the horizon of middles, which only tokens=fill_in_the_middle gives",
                f"tokens={settings.choice('tokens')}",
                "Use tokens=fill_in_the_middle, or objective=text.",
            )

    def attach(self, bundle: Bundle, ctx: Context) -> nn.Module:
        with seeded(ctx.seed):
            self.head = nn.Linear(bundle.architecture.width, 1, dtype=torch.float32)
        return self.head

    def counts(self, batch: Batch) -> dict[str, float]:
        return {HORIZON: float(batch.remembered[HORIZON].isfinite().sum())}

    def loss(self, view: StepView) -> Loss:
        ntp = super().loss(view).value
        error = self._error(view)
        # a second mean: its own count instead of the number of trained tokens
        hlp = error * view.counts["loss"] / max(1.0, view.counts[HORIZON])
        return Loss(ntp + self.weight * hlp, {"ntp": ntp, "hlp": hlp})

    def _error(self, view: StepView) -> Tensor:
        """Sum of |yhat - y| over the tokens with a horizon."""
        y = view.batch.remembered[HORIZON]
        known = y.isfinite()
        states = view.states[known]
        with torch.autocast(states.device.type, enabled=False):
            guess = self.head(states.float()).squeeze(-1)
        y_hat = guess.sigmoid() if self.head_activation == "sigmoid" else guess
        return (y_hat - y[known]).abs().sum()
