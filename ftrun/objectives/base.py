"""What an objective is: the kind of rows it eats and the loss of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from ftrun.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ftrun.config.settings import Settings
    from ftrun.runs.context import Context
    from ftrun.data.batches import Batch
    from ftrun.models.bundle import Bundle
    from ftrun.training.view import StepView

Kind = Literal["sft", "text", "pairs", "prompts", "labels"]


@dataclass
class Loss:
    """``value`` is a sum, not a mean: the loop divides it by the global ``count`` of the whole optimiser step.

    ``parts`` are sums too, divided by the same count, and end in metrics.jsonl.
    """

    value: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


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
