"""Merging an adapter into one of two layers that share a weight: they are told apart first, or both would change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

WRAPPED = ("base_layer", "original_module")  # where peft keeps what it wraps


@contextmanager
def told_apart(model: Any) -> Iterator[None]:
    """Inside, what an adapter of the peft model ``model`` sits on shares no weight with a layer elsewhere.

    Afterwards embedding and head share their weight again where both have become the same; else the config says that
    they are not tied.
    """
    base: Any = model.get_base_model()
    tied = _tied(base)
    _give_own_weights(base)
    yield
    if not tied:
        return
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if torch.equal(embedding.weight, head.weight):
        head.weight = embedding.weight
    for config in {id(config): config for config in (base.config, base.config.get_text_config(decoder=True))}.values():
        config.tie_word_embeddings = head.weight is embedding.weight


def _tied(base: Any) -> bool:
    head = base.get_output_embeddings()
    return head is not None and _weight(head) is _weight(base.get_input_embeddings())


def _weight(layer: Any) -> Any:
    """The base's weight of a layer that adapters may be wrapped around."""
    while not isinstance(layer, (nn.Linear, nn.Embedding)) and any(hasattr(layer, name) for name in WRAPPED):
        layer = next(getattr(layer, name) for name in WRAPPED if hasattr(layer, name))
    return getattr(layer, "weight", None)


def _give_own_weights(base: nn.Module) -> None:
    adapted: set[nn.Module] = set()  # everything below an adapter
    for module in base.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            adapted |= set(module.modules())
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module, name))
    for parameter, places in owners.items():
        for module, name in places if len(places) > 1 else []:
            if module in adapted:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
