"""A slice of every weight in every process: torch's FSDP2, a unit a decoder layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ftrun.training.distributed import Team
from ftrun.training.gradients import backward
from ftrun.training.strategies.base import Strategy


class Fsdp(Strategy):
    """The weights of a layer are gathered before it works and given up afterwards; its gradients are summed into slices.

    What lies outside of the decoder layers (embeddings, norm, head, an objective's own modules) is one unit more, whole
    while a step is at work.
    """

    name = "fsdp"
    sharded = True

    def __init__(self, team: Team, reshard_after_forward: bool = True, offload: bool = False):
        super().__init__(team)
        self.reshard_after_forward, self.offload = reshard_after_forward, offload
        self._mesh = init_device_mesh(team.device.type, (team.world_size,))
        team.splits = False

    def place(self, parts: Mapping[str, nn.Module], layers: Iterable[nn.Module]) -> None:
        super().place(parts, layers)
        mesh, again = self._mesh, self.reshard_after_forward
        offload = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=again, offload_policy=offload)
        fully_shard(self.root, mesh=mesh, reshard_after_forward=False, offload_policy=offload)
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # the sum, not the mean
                module.set_force_sum_reduction_for_comms(True)

    def rounds(self, mine: int) -> int:
        return max(1, *self.team.gather_object(mine))

    def backward(self, work: Callable[[], Tensor], last: bool) -> None:
        backward(self.root(work))

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        return self.root(work)

    def clip(self, parameters: list[nn.Parameter], bound: float | None) -> float:
        have = [parameter for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(have, math.inf if bound is None else bound)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def open(self) -> None:
        with torch.no_grad():
            self.root(lambda: torch.zeros(()))  # gathers what lies outside of the layers; each layer sees to itself

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[bool]:
        """Whole weights on process 0, in its ordinary memory; the slices come back afterwards."""
        self._close()
        held: list[tuple[nn.Module, str, nn.Parameter]] = []
        whole: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if isinstance(parameter, DTensor):
                    if id(parameter) not in whole:
                        whole[id(parameter)] = self._whole(parameter)
                    held.append((module, name, parameter))
        if self.team.is_main:
            for module, name, parameter in held:
                module._parameters[name] = whole[id(parameter)]
        try:
            yield self.team.is_main
        finally:
            for module, name, parameter in held:
                module._parameters[name] = parameter

    def _whole(self, parameter: Any) -> Any:
        full = parameter.full_tensor()  # every process takes part
        return nn.Parameter(full.cpu(), requires_grad=parameter.requires_grad) if self.team.is_main else None

    def _close(self) -> None:
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
