"""Fine-tuning that unlearns the tokens that teach least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from ftrun.errors import ConfigError, DataError
from ftrun.registry import register
from ftrun.tokens.reference import ComparesWithReference
from ftrun.tokens.step_ranking import descending

if TYPE_CHECKING:
    from ftrun.data.tokens import TokenTable
    from ftrun.training.context import Context
    from ftrun.training.view import StepView

SIGN = "sign"  # remembered: 1 learned, -1 forgotten


@register("tokens", "forgetting_sft")
@dataclass
class ForgettingSft(ComparesWithReference):
    """Learn the tokens worth learning, ascend on the others (Taheri Ghahrizjani et al., 2026, arXiv:2508.04329).

    score = nll under the model before training - nll under a reference, the same model fine-tuned on good rows. Of all
    N trained tokens the ``int(rho * N)`` highest are positive, the next ``int((1 - rho) * N)`` negative.
    L = sum of nll over positives / #positives - lambda * sum of nll over negatives / #negatives, counted over the whole
    optimiser step, with lambda = (lambda_max - lambda_min) * step / steps. Training starts from the base model.
    """

    rho: float = 0.7  # share of the trained tokens that is learned
    lambda_max: float = 0.25  # weight of forgetting that the ramp heads for (T_max in the code)
    lambda_min: float = 1e-5  # taken off lambda_max; the ramp starts at 0 whatever it is (T_min in the code)

    needs: ClassVar[dict[str, str]] = {"token_loss": "turns the loss of single tokens around"}
    static: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    dynamic: ClassVar[bool] = True
    whole_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rho <= 1:
            raise ConfigError(f"tokens.rho is a share above 0 and up to 1, not {self.rho}", f"tokens.rho={self.rho}")
        if not 0 <= self.lambda_min <= self.lambda_max:
            raise ConfigError(
                "tokens.lambda_max must not be below tokens.lambda_min, nor that below 0",
                f"tokens.lambda_max={self.lambda_max} tokens.lambda_min={self.lambda_min}",
            )

    def precompute(self, table: TokenTable, ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        """Weights stay but for a token that rounding leaves in neither set."""
        scores = self.excess_losses(table, ctx)
        self._signs = signs(scores, self.rho)
        if not (self._signs == 1).any():
            raise DataError(
                f"forgetting_sft learns none of {int((~np.isnan(scores)).sum())} trained tokens",
                f"tokens.rho={self.rho}",
                "Raise tokens.rho.",
            )
        return scores, np.where(np.isnan(self._signs), 0, table.loss_weight).astype(np.float32)

    def remember(self, table: TokenTable, ctx: Context) -> dict[str, np.ndarray]:
        forgotten = int((self._signs == -1).sum())
        ctx.report.note(f"{int((self._signs == 1).sum())} tokens are learned, {forgotten} are forgotten")
        return {SIGN: self._signs}

    def statistic(self, view: StepView) -> Tensor:
        """Positives and negatives of a micro-batch, (2,)."""
        sign = view.batch.remembered_targets(SIGN)
        return torch.stack([(sign > 0).sum(), (sign < 0).sum()]).float()

    def weigh(self, view: StepView) -> Tensor:
        assert view.step_statistics is not None
        positives, negatives = view.step_statistics.view(-1, 2).sum(dim=0).tolist()
        n = positives + negatives  # what the objective divides by
        ramp = self.ramp(view.step, view.steps)  # lambda
        learned = view.batch.remembered_targets(SIGN) > 0
        nll = view.token_nll.detach()
        up, down = n / max(positives, 1), n / max(negatives, 1)
        view.parts |= {
            "learned_nll": nll[learned].sum() * up,
            "forgotten_nll": nll[~learned].sum() * down,
            "lambda": torch.tensor(ramp * view.batch.trained_tokens),
        }
        return torch.where(learned, up, -ramp * down).to(nll)

    def ramp(self, step: int, steps: int) -> float:
        """``lambda`` of optimiser step ``step``, from 0."""
        return (self.lambda_max - self.lambda_min) * step / steps


def signs(scores: np.ndarray, rho: float) -> np.ndarray:
    """1 for the ``int(rho * n)`` highest of n scores, -1 for the next ``int((1 - rho) * n)``, NaN for all else."""
    order = descending(scores)
    positives, negatives = int(rho * len(order)), int((1 - rho) * len(order))
    found = np.full(len(scores), np.nan, np.float32)
    found[order[:positives]] = 1
    found[order[positives : positives + negatives]] = -1
    return found
