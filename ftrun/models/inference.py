"""A model asked for what it says, and left as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    pass


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode and all random generators come back afterwards."""
    modes = {module: module.training for module in model.modules()}
    plain, arrays, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        random.setstate(plain)
        np.random.set_state(arrays)
        torch.set_rng_state(tensors)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
