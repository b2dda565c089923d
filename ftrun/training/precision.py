"""Which dtype the weights that train have, settled when a training is set up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ftrun.errors import ConfigError
from ftrun.models.precision import mix, widen

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.runs.progress import Reporter


def settle_precision(bundle: Bundle, parameters: dict[str, nn.Parameter], pure: bool, report: Reporter) -> None:
    """Give everything that may train float32 weights, and products in the model's dtype; ``pure``: its weights too.

    Raises ConfigError for float16, whose gradients would vanish, and where ``pure`` has no effect.
    """
    if bundle.dtype == torch.float16:
        raise ConfigError(
            "small gradients vanish in float16, and ftrun does not scale the loss against that",
            "model.dtype=float16",
            "Train with model.dtype=bfloat16 or float32; float16 is for evaluation and generation.",
        )
    if not pure:
        widen(parameters.values())
        mix(bundle, parameters.values())
        return
    if bundle.dtype != torch.bfloat16:
        raise ConfigError(
            "pure bfloat16 has no effect on a model in float32", "train.pure_bfloat16=true", "Add model.dtype=bfloat16."
        )
    for parameter in parameters.values():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(torch.bfloat16)
    report.warn(
        "pure bfloat16: an update below about 0.4% of a weight is lost, and at small learning rates hardly anything is learned"
    )
