"""Full-parameter methods that train only a few blocks at a time, and others later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftrun.adapters.base import Adapter
from ftrun.adapters.plain_weights import load_again, save_model

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from ftrun.training.context import Context

STATE_TENSOR_KEYS = ("step",)  # counters stay where the optimiser keeps them


@dataclass
class ActiveSet(Adapter):
    """Base of layer-wise methods: which blocks train is drawn anew every ``interval`` optimiser steps.

    The optimiser is built while every candidate trains. A switch happens before the first micro-batch of a step:
    leavers get ``requires_grad=False`` and ``grad=None`` (with a zero gradient Adam would still move them), and their
    optimiser state is treated as ``state`` says. The set of a step depends on (seed, step // interval) alone, so all
    processes agree and a resumed run goes on with the same sequence.
    """

    needs: ClassVar[dict[str, str]] = {"trainable_base": "trains layers of the base weights"}
    changes_trainable: ClassVar[bool] = True

    interval: int = 20  # optimiser steps between two draws
    state: str = "drop"  # optimiser state of blocks that go to sleep

    def blocks(self, model: nn.Module, ctx: Context) -> list[list[nn.Parameter]]:
        """The parameters of each block that takes turns; what is in no block keeps its ``requires_grad``."""
        raise NotImplementedError

    def draw(self, switch: int, blocks: int, generator: np.random.Generator) -> Iterable[int]:
        """The blocks that train after switch number ``switch`` (from 0)."""
        raise NotImplementedError

    def attach(self, model: nn.Module, ctx: Context) -> nn.Module:
        self._tokenizer = ctx.bundle.tokenizer if ctx.bundle else None
        self._seed = ctx.seed
        model.requires_grad_(True)
        self._model = model
        self._blocks = self.blocks(model, ctx)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = [[names[id(parameter)] for parameter in block] for block in self._blocks]
        self._optimizer: Optimizer | None = None
        self._switch = -1
        self.active: list[int] = list(range(len(self._blocks)))
        return model

    def bind(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        now = dict(self._model.named_parameters())  # slices may have taken the place of whole parameters
        self._blocks = [[now[name] for name in names] for names in self._names]

    def before_step(self, step: int) -> None:
        switch = step // self.interval
        if switch != self._switch:
            drawn = sorted(self.draw(switch, len(self._blocks), np.random.default_rng([self._seed, switch])))
            first, self._switch = self._switch < 0, switch
            self._activate(drawn)
            if self.state == "reset_all" and not first and self._optimizer is not None:
                self._optimizer.state.clear()

    def _activate(self, drawn: list[int]) -> None:
        self.active = drawn
        awake = {id(parameter) for index in drawn for parameter in self._blocks[index]}
        for parameter in (parameter for block in self._blocks for parameter in block):
            parameter.requires_grad_(id(parameter) in awake)
            if id(parameter) not in awake:
                parameter.grad = None
            self._keep_state(parameter, awake=id(parameter) in awake)

    def _keep_state(self, parameter: nn.Parameter, awake: bool) -> None:
        """Drop or move the optimiser state of one parameter."""
        if self._optimizer is None or parameter not in self._optimizer.state:
            return
        if self.state == "drop" and not awake:
            del self._optimizer.state[parameter]
        elif self.state == "offload":
            moments = self._optimizer.state[parameter]
            device = parameter.device if awake else "cpu"
            for key, value in moments.items():
                if hasattr(value, "to") and key not in STATE_TENSOR_KEYS:
                    moments[key] = value.to(device)

    def save(self, model: nn.Module, folder: Path) -> Path:
        return save_model(model, self._tokenizer, folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        return load_again(model, folder / "model")

    def state_dict(self) -> dict[str, Any]:
        return {"switch": self._switch, "active": list(self.active)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._switch = int(state["switch"])
        if self._switch >= 0:
            self._activate([int(index) for index in state["active"]])
