"""A whole copy of the model in every process: torch's DistributedDataParallel."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ftrun.training.distributed import Team
from ftrun.training.gradients import backward
from ftrun.training.strategies.base import Strategy


class Ddp(Strategy):
    """Gradients are added up while the backward pass still runs, once an optimiser step."""

    name = "ddp"

    def place(self, parts: Mapping[str, nn.Module], layers: Iterable[nn.Module]) -> None:
        super().place(parts, layers)
        self.team.broadcast_([parameter for parameter in self.root.parameters() if parameter.requires_grad])
        self._engine: DistributedDataParallel | None = None
        self._training: list[nn.Parameter] = []

    def before_step(self) -> None:
        training = [parameter for parameter in self.root.parameters() if parameter.requires_grad]
        if len(training) == len(self._training) and all(a is b for a, b in zip(training, self._training, strict=True)):
            return
        self._engine = None  # its hooks go first
        self._training = training
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # its new name is not in older versions
            self._engine = DistributedDataParallel(
                self.root,
                find_unused_parameters=True,  # a batch need not reach every part of a model or an objective
                broadcast_buffers=False,
                init_sync=False,  # weights are equal already: from one file, and those that train were sent round
            )
        self._engine.register_comm_hook(None, _sum)

    def rounds(self, mine: int) -> int:
        return max(1, mine)

    def backward(self, work: Callable[[], Tensor], last: bool) -> None:
        assert self._engine is not None
        with nullcontext() if last else self._engine.no_sync():
            backward(self._engine(work))


# torch looks at the types themselves, so this file does not put annotations off
def _sum(
    _: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """The sum, not the mean: a loss is divided by what the whole step counts."""
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def whole_copies(team: Team) -> Strategy:
    """The strategy in which every process has a whole copy of what it trains."""
    return Ddp(team) if team.world_size > 1 else Strategy(team)
