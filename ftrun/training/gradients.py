"""Backward passes that fail where an operation has no gradient, instead of training past it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ftrun.errors import ComponentError

NO_GRADIENT = "an autograd kernel was not registered"  # torch's warning; its own mode that raises does not exist yet


def backward(loss: Tensor) -> None:
    """``loss.backward()``. Raises ComponentError where it reaches an operation without a gradient."""
    with _every_gradient():
        loss.backward()


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Of ``loss`` by ``parameters``; None for one that it does not depend on. Raises ComponentError like `backward`."""
    with _every_gradient():
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))


@contextmanager
def _every_gradient() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{NO_GRADIENT}")
        try:
            yield
        except UserWarning as warning:
            if NO_GRADIENT not in str(warning):
                raise
            operation = str(warning).split(": ")[0].strip()
            raise ComponentError(
                f"the loss depends on {operation}, an operation without a gradient: what lies before it would not train",
                "the backward pass",
                "Use quant=none, or another adapter or model; library versions that work together: `ftrun doctor`.",
            ) from warning
