"""Selective language modelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.tokens.reference import ComparesWithReference, own_scoring
from ftrun.tokens.step_ranking import keep_highest, kept_count, ranked, ranks
from ftrun.training.view import StepView

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.data.tokens import TokenTable
    from ftrun.training.context import Context


@register("tokens", "rho1")
@dataclass
class Rho1(ComparesWithReference):
    """Trains the tokens that a reference model finds easier than the model does now (Lin et al., 2024, arXiv:2404.07965).

    excess loss = nll under the model being trained - nll under the reference, a model tuned on good rows. Of the N
    trained tokens of an optimiser step the ``ceil(k * N)`` of the highest excess loss are kept, equal ones in the order
    of the data, and the loss is their mean. What is learned already and what cannot be learned drop out, and the choice
    moves on as the model learns. With ``scope=sample`` each sequence keeps ``ceil(k * n)`` of its own.
    """

    k: float = 0.6  # share of the trained tokens that is kept
    scope: Literal["step", "sample"] = "step"  # one ranking an optimiser step, or one in each sequence

    needs: ClassVar[dict[str, str]] = {"token_loss": "trains a share of the tokens"}
    own_reference: ClassVar[str] = "the tokens that training made worse are kept"
    remembers: ClassVar[bool] = True
    dynamic: ClassVar[bool] = True
    whole_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.k <= 1:
            raise ConfigError(f"tokens.k is a share above 0 and up to 1, not {self.k}", f"tokens.k={self.k}")

    def remember(self, table: TokenTable, ctx: Context) -> dict[str, np.ndarray]:
        """Losses of all trained tokens under the reference."""
        own = own_scoring(ctx)
        losses = self.reference_losses(table, own, ctx)
        own.discard()
        return {"reference_nll": losses}

    def statistic(self, view: StepView) -> Tensor:
        """For ``scope=step`` the excess losses of all tokens, to be ranked; else numbers of kept and of all tokens, (2,)."""
        if self.scope == "step":
            return ranked(view, self.excess(view))
        return torch.tensor([quotas(view.batch, self.k).sum(), view.batch.trained_tokens]).double()

    def weigh(self, view: StepView) -> Tensor:
        """The same factor for all tokens of the step that are kept, so that the loss is their mean; 0 for the others."""
        assert view.step_statistics is not None
        if self.scope == "step":
            return keep_highest(view, self.k)
        kept, count = view.step_statistics.cpu().numpy().reshape(-1, 2).sum(axis=0)
        sequence = view.batch.target_sequence.cpu().numpy()
        stays = ranks(sequence, -self.excess(view).cpu().numpy()) < quotas(view.batch, self.k)[sequence]
        return torch.from_numpy(stays * (count / max(1.0, kept))).to(view.token_nll)

    def excess(self, view: StepView) -> Tensor:
        """Excess loss of every trained token, (tokens,)."""
        return view.token_nll.detach() - view.batch.remembered_targets("reference_nll")


def quotas(batch: Batch, share: float) -> np.ndarray:
    """Tokens that every sequence keeps, (sequences,)."""
    trained = torch.bincount(batch.target_sequence, minlength=batch.sequences).tolist()
    return np.array([kept_count(share, count) for count in trained], np.int64)
