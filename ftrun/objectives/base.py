"""What an objective is: the kind of rows it eats and the loss of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ftrun.errors import ConfigError
from ftrun.training.parts import Loss

if TYPE_CHECKING:
    from torch import nn

    from ftrun.config.settings import Settings
    from ftrun.data.batches import Batch
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context
    from ftrun.training.view import StepView

Kind = Literal["sft", "text", "pairs", "prompts", "labels"]


@dataclass
class Objective:
    needs: ClassVar[dict[str, str]] = {}
    lacks: ClassVar[dict[str, str]] = {}
    kind: ClassVar[Kind] = "sft"  # what rows are turned into
    packs: ClassVar[bool] = False  # rows may share a packed row: only per-token losses do not mind
    uses_reference: ClassVar[bool] = False  # needs the untrained model's token losses

    def check(self, settings: Settings) -> None:
        """Refuse settings that this objective cannot work with, before anything is loaded. Raises ConfigError."""
        if settings.train.packing and not self.packs:
            name = settings.choice("objective")
            raise ConfigError(
                f"objective={name} needs every row apart", "train.packing=true", "Use train.packing=false."
            )

    def attach(self, bundle: Bundle, ctx: Context) -> nn.Module | None:
        """A module whose parameters train with the model and lie in its checkpoints, but not in what is saved.

        The objective keeps it for its loss.
        """
        return None

    def count(self, batch: Batch) -> float:
        """What the summed loss of this batch is divided by: known before the forward pass, added up over all ranks."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, float]:
        """Further numbers of this batch, known before the forward pass; ``view.counts`` has their sums over the step.

        A second mean in the loss is ``its sum * view.counts["loss"] / view.counts["its name"]``; "loss" is `count`.
        """
        return {}

    def loss(self, view: StepView) -> Loss:
        """The summed loss of one micro-batch."""
        raise NotImplementedError


@dataclass
class TokenLoss(Objective):
    """Cross-entropy of the trained tokens, each with its loss weight: sum of w_t * nll_t over the number of trained tokens.

    The divisor counts tokens of weight above 0 in the whole optimiser step, over all processes and micro-batches.
    """

    packs: ClassVar[bool] = True

    def count(self, batch: Batch) -> float:
        return float(batch.trained_tokens)

    def loss(self, view: StepView) -> Loss:
        return Loss((view.weights * view.token_nll).sum())
