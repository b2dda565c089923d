"""How the processes of a run share a step. The plainest way is one process, which shares it with nobody."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor, nn

from ftrun.training.distributed import Team
from ftrun.training.gradients import backward


class Root(nn.Module):
    """Everything that a step may train, under one roof: engines see a forward pass go in here and its loss come out."""

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        """``work()``: the loss of one micro-batch from the parts."""
        return work()


class Strategy:
    """One process. The others override what several processes do differently."""

    name: ClassVar[str] = "one"
    sharded: ClassVar[bool] = (
        False  # each process holds a slice of the weights, and all must call the model equally often
    )

    def __init__(self, team: Team):
        self.team = team
        self.root = Root({})

    def place(self, parts: Mapping[str, nn.Module], layers: Iterable[nn.Module]) -> None:
        """Take charge of the parts of a training, in place; ``layers`` are the decoder layers among them."""
        self.root = Root(parts)

    def before_step(self) -> None:
        """Called when it is settled which parameters train in the step."""

    def rounds(self, mine: int) -> int:
        """Micro-batches of this process in a step in which it has ``mine`` of its own; the rest count nothing."""
        return mine

    def backward(self, work: Callable[[], Tensor], last: bool) -> None:
        """Forward and backward of one micro-batch; after the ``last`` one gradients are sums over all processes."""
        backward(self.root(work))

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        """A pass whose gradient nobody asks for."""
        return work()

    def clip(self, parameters: list[nn.Parameter], bound: float | None) -> float:
        """Scale the gradients down to a joint norm of ``bound``; the norm before."""
        have = [parameter for parameter in parameters if parameter.grad is not None]
        return float(nn.utils.clip_grad_norm_(have, math.inf if bound is None else bound))

    def release(self) -> None:
        """Let go of the parts."""
        self.root = Root({})

    def open(self) -> None:
        """Let the model be called from anywhere, for evaluation; all processes must then call it equally often."""

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[bool]:
        """A context in which ``model`` has its whole weights where this is true: on process 0 at least."""
        yield self.team.is_main
