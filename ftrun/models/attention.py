"""Attention maps of a model's layers: looked at as they are made, or made again from what a layer was given."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftrun.errors import ComponentError

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.models.bundle import Bundle


def states_and_maps(bundle: Bundle, batch: Batch, layers: int, look: Callable[[Tensor], None]) -> Tensor:
    """Final hidden states, (rows, time, width); ``look`` is given the map of each of the last ``layers`` layers.

    A map is (rows, heads, time, time), queries by keys, and is gone after the call: only one exists at a time. The
    layers before compute attention as always, without a map. Batches hold one sequence a row, padding on the right.
    Raises ComponentError for a model whose attention gives no map.
    """
    seen = 0

    def looked(weights: Tensor) -> None:
        nonlocal seen
        seen += 1
        look(weights)

    wanted = bundle.architecture.layers[-layers:]
    with ExitStack() as changed:
        for layer in wanted:
            changed.enter_context(_eager(_attention_of(layer), batch.input_ids.shape[1], looked))
        states = bundle.architecture.hidden_states(bundle.model, batch)
    if seen != len(wanted):
        raise _no_maps(bundle.architecture.family)
    return states


@dataclass(frozen=True)
class AttentionCall:
    """What the attention module of a layer was given for one batch, without gradient."""

    module: Any
    states: Tensor  # (rows, time, width)
    named: dict[str, Any]  # the other arguments

    @torch.no_grad()
    def map_of(self, row: int, start: int, end: int) -> Tensor:
        """Attention within the sequence that stands in ``row`` from ``start`` to ``end``, (heads, queries, keys).

        Computed as if the sequence stood alone, without dropout. Raises ComponentError for a module that gives no map.
        """
        found: list[Tensor] = []
        training = [part for part in self.module.modules() if part.training]
        self.module.eval()
        try:
            with _eager(self.module, end - start, found.append):
                self.module(self.states[row : row + 1, start:end], **self._named_of(row, start, end))
        finally:
            for part in training:
                part.training = True
        if not found:
            raise _no_maps(type(self.module).__name__)
        return found[0][0]

    def _named_of(self, row: int, start: int, end: int) -> dict[str, Any]:
        """The arguments cut to one sequence: rotations and positions; masks, caches and bounds of others left out."""
        kept: dict[str, Any] = {}
        for name, value in self.named.items():
            if name == "position_embeddings":
                kept[name] = tuple(table[min(row, len(table) - 1)][None, start:end] for table in value)
            elif name == "position_ids" and isinstance(value, Tensor):
                kept[name] = value[min(row, len(value) - 1)][None, start:end]
            elif not isinstance(value, Tensor) and "past" not in name:
                kept[name] = value
        return kept


@contextmanager
def kept_calls(layer: nn.Module, calls: list[AttentionCall]) -> Iterator[None]:
    """Within it, ``calls`` gets what the attention of ``layer`` is given in each forward pass."""
    attention = _attention_of(layer)

    def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        others = dict(named)
        states = given[0] if given else others.pop("hidden_states")
        calls.append(AttentionCall(attention, states.detach(), others))

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _attention_of(layer: nn.Module) -> Any:
    for name, module in layer.named_modules():
        if re.search("attn|attention", name.rpartition(".")[2]) and hasattr(module, "config"):
            return module
    raise _no_maps(type(layer).__name__)


@contextmanager
def _eager(attention: Any, time: int, look: Callable[[Tensor], None]) -> Iterator[None]:
    """Within it, this module computes its map in full and shows it."""
    shared = attention.config
    attention.config = copy.copy(shared)
    attention.config._attn_implementation = "eager"
    mask: list[Tensor] = []

    def masked(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # the other layers need no mask to be causal, so the model makes none that eager attention could use
        states = given[0] if given else named["hidden_states"]
        window = getattr(
            attention, "sliding_window", getattr(shared, "sliding_window", None)
        )  # of the layer, or of all
        mask[:] = mask or [_causal(time, window, states)]
        return given, named | {"attention_mask": mask[0]}

    def shown(_: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor) and output[1].ndim == 4:
            look(output[1])
            return (output[0], None, *output[2:])
        return output

    hooks = [
        attention.register_forward_pre_hook(masked, with_kwargs=True),
        attention.register_forward_hook(shown),
    ]
    try:
        yield
    finally:
        attention.config = shared
        for hook in hooks:
            hook.remove()


def _causal(time: int, window: int | None, like: Tensor) -> Tensor:
    """What eager attention adds to its scores, (1, 1, time, time): 0 where a query sees a key, else the lowest number."""
    place = torch.arange(time, device=like.device)
    distance = place[:, None] - place[None, :]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(time, time, dtype=like.dtype, device=like.device).masked_fill_(hidden, lowest)[None, None]


def _no_maps(model: str) -> ComponentError:
    return ComponentError(
        f"the attention of {model} gives no maps", todo="Use another model; to score only: select.model.path=..."
    )
