"""Mixed precision: what trains has float32 weights, and matrix products run in the model's dtype.

A bfloat16 number has 8 bits: an update below half a percent of a weight is rounded away, and full fine-tuning at 1e-5
learns nothing. So the weights that train are widened, and autocast narrows copies of them for each product. It sits in
the model itself, so that whoever runs it afterwards (scoring, evaluators, generation) computes the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ftrun.models.wrappers import unwrap

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle

NARROW = (torch.bfloat16, torch.float16)


class Mixed:
    """A module whose forward runs under autocast; `mix` makes it."""

    products: torch.dtype


def widen(parameters: Iterable[nn.Parameter]) -> None:
    """Make parameters of half precision float32, in place: ties and the optimiser's references stay."""
    for parameter in parameters:
        if parameter.dtype in NARROW:
            parameter.data = parameter.data.float()
            parameter.grad = None


def mix(bundle: Bundle, others: Iterable[nn.Parameter] = ()) -> None:
    """Have the model compute its products in ``bundle.dtype`` where some of its weights are wider; may be called again.

    ``others``: parameters outside of the model that work on its states.
    """
    base = unwrap(bundle.model)
    wide = any(p.dtype == torch.float32 for p in (*bundle.model.parameters(), *others))
    if bundle.dtype in NARROW and wide:
        _set(_parts(base, bundle.architecture.backbone), bundle.dtype)


def products_of(model: nn.Module) -> torch.dtype | None:
    """The dtype that autocast gives to the products of ``model``; None where they have the dtype of the weights."""
    base = unwrap(model)
    return base.products if isinstance(base, Mixed) else None


def set_products(model: nn.Module, backbone: str, dtype: torch.dtype | None) -> None:
    """Put back what `products_of` gave."""
    _set(_parts(unwrap(model), backbone), dtype)


def products(model: nn.Module) -> AbstractContextManager[Any]:
    """A context for work on a model's states outside of the model: autocast as inside it."""
    dtype = products_of(model)
    return nullcontext() if dtype is None else _autocast(next(model.parameters()).device.type, dtype)


def _autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    # a copy that was cached under no_grad would be used again in the step, and no gradient would pass it
    return torch.autocast(device, dtype=dtype, cache_enabled=False)


def _parts(base: nn.Module, backbone: str) -> list[nn.Module]:
    """What is called from outside: the whole model, and its backbone."""
    return [base, *([base.get_submodule(backbone)] if backbone else [])]


def _set(modules: list[Any], dtype: torch.dtype | None) -> None:
    for module in modules:
        if isinstance(module, Mixed):
            module.__class__ = type(module).__mro__[2]  # type: ignore[assignment]  # the plain class
            del module.products
        if dtype is not None:
            module.__class__ = _subclass(type(module))  # type: ignore
            module.products = dtype


@functools.cache
def _subclass(plain: type[nn.Module]) -> type[nn.Module]:
    """``plain`` under autocast, with its name, signature and source: weights, hooks and copies stay as they are."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _autocast(next(self.parameters()).device.type, self.products):
            return plain.forward(self, *args, **kwargs)

    return type(plain.__name__, (Mixed, plain), {"forward": forward, "__module__": plain.__module__})
