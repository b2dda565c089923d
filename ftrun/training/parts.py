"""What the loop asks of an adapter, an objective and a token policy: their base classes lie above, with their methods."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from ftrun.data.batches import Batch, Plan
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context
    from ftrun.training.distributed import Team
    from ftrun.training.view import StepView


@dataclass
class Loss:
    """``value`` is a sum, not a mean: the loop divides it by the global ``count`` of the whole optimiser step.

    ``parts`` are sums too, divided by the same count, and end in metrics.jsonl.
    """

    value: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Loop(Protocol):
    """The loop as a token policy sees it before a step: it may give ``table`` other weights."""

    ctx: Context
    bundle: Bundle
    table: TokenTable
    plan: Plan
    team: Team
    folder: Path


class Attached(Protocol):
    """An adapter. What each method is for: ftrun/adapters/base.py."""

    def attach(self, model: nn.Module, ctx: Context) -> nn.Module: ...
    def bind(self, optimizer: Optimizer) -> None: ...
    def before_step(self, step: int) -> None: ...
    def after_step(self, step: int) -> None: ...
    def disabled(self, model: nn.Module) -> AbstractContextManager[None] | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Minimised(Protocol):
    """An objective. What each method is for: ftrun/objectives/base.py."""

    kind: ClassVar[Any]
    packs: ClassVar[bool]

    def attach(self, bundle: Bundle, ctx: Context) -> nn.Module | None: ...
    def count(self, batch: Batch) -> float: ...
    def counts(self, batch: Batch) -> dict[str, float]: ...
    def loss(self, view: StepView) -> Loss: ...


class Weighing(Protocol):
    """A token policy. What each method is for: ftrun/tokens/base.py."""

    dynamic: ClassVar[bool]
    whole_step: ClassVar[bool]
    perturbs: ClassVar[bool]
    arranges: ClassVar[bool]
    packs: ClassVar[bool]

    def attach(self, bundle: Bundle, ctx: Context) -> nn.Module | None: ...
    def order(self, table: TokenTable) -> np.ndarray | None: ...
    def before_step(self, step: int, trainer: Loop) -> None: ...
    def watched_layer(self) -> int | None: ...
    def input_lengths(self, table: TokenTable) -> np.ndarray: ...
    def arrange(self, batch: Batch, seed: tuple[int, int], progress: float) -> Batch: ...
    def statistic(self, view: StepView) -> Tensor: ...
    def weigh(self, view: StepView) -> Tensor: ...
    def perturb(self, embeddings: Tensor, batch: Batch, seed: tuple[int, int]) -> Tensor: ...
