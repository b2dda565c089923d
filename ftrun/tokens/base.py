"""What a token policy is: which tokens are trained, and how much each weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ftrun.context import Context
    from ftrun.data.batches import Batch
    from ftrun.data.tokens import TokenTable
    from ftrun.training.view import StepView


@dataclass
class TokenPolicy:
    """Base of token policies. A method overrides the one thing it is about."""

    needs: ClassVar[dict[str, str]] = {}
    lacks: ClassVar[dict[str, str]] = {}
    static: ClassVar[bool] = False  # has `precompute`
    dynamic: ClassVar[bool] = False  # has `weigh`
    whole_step: ClassVar[bool] = False  # `weigh` needs statistics of the whole optimiser step: overrides `statistic`
    perturbs: ClassVar[bool] = False  # has `perturb`

    def precompute(self, table: TokenTable, ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        """Scores and new loss weights of every token of the table, (tokens,) each; stored as selection/tokens.parquet.

        A score is NaN where the token has none (prompt tokens).
        """
        raise NotImplementedError

    def statistic(self, view: StepView) -> Tensor:
        """Numbers of one micro-batch, (n,), that all micro-batches and ranks of the step put together for `weigh`."""
        raise NotImplementedError

    def weigh(self, view: StepView) -> Tensor:
        """Factors on the loss weights of the trained tokens, (tokens,), without gradient.

        ``view.step_statistics`` holds what `statistic` gave for the whole step.
        """
        raise NotImplementedError

    def perturb(self, embeddings: Tensor, batch: Batch, seed: tuple[int, int]) -> Tensor:
        """Token embeddings (rows, time, width) as the training forward pass sees them.

        ``seed`` is that of the run and the number of the optimiser step.
        """
        raise NotImplementedError
