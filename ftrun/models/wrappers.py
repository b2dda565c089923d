"""Models inside wrappers, and forward passes with a part observed or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside peft, DistributedDataParallel and torch.compile."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def adds_virtual_tokens(model: nn.Module) -> bool:
    """Whether a peft prompt or prefix method is active on the model."""
    while not hasattr(model, "active_peft_config"):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            return False
        model = inner
    return bool(model.active_peft_config.is_prompt_learning)  # type: ignore[union-attr]


def own_logits(base: nn.Module, backbone: str) -> Callable[[Tensor], Tensor]:
    """The model's own way from hidden states (n, width) to logits (n, vocabulary): its forward with the backbone left out."""

    def logits(hidden: Tensor) -> Tensor:
        given = BackboneOutput((hidden.unsqueeze(0),))
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with _replaced_forward(base.get_submodule(backbone), lambda *args, **kwargs: given):
            return base(input_ids=ids, use_cache=False).logits.squeeze(0)

    return logits


class BackboneOutput(tuple):
    """Final hidden states and nothing else, for any family's head: every optional output is None."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")  # hooks of accelerate live there
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def kept_output(module: nn.Module) -> Iterator[list[Any]]:
    kept: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def changed_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A context in which ``module`` gives ``change`` of its output."""
    handle = module.register_forward_hook(lambda *call: change(call[-1]))
    try:
        yield
    finally:
        handle.remove()
