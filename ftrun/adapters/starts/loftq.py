"""LoftQ: a quantised base and a low-rank part that together are closest to the full-precision weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftrun.errors import ComponentError
from ftrun.models.quiet import without_bars


def loftq(
    weight: Tensor, rank: int, iterations: int, round_trip: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """``(residual, B, A)`` with ``round_trip(residual) + B A`` near ``weight`` (Li et al., 2023, arXiv:2310.08659).

    Alternates ``Q = quantise(W - B A)`` and ``B A = SVD_r(W - Q)``, from ``B A = 0``. One iteration leaves the
    quantised base as it is and only fits the adapter to its error. Shapes (out, in), (out, rank), (rank, in).
    """
    residual = weight
    b, a = weight.new_zeros(weight.shape[0], rank), weight.new_zeros(rank, weight.shape[1])
    for _ in range(iterations):
        residual = weight - b @ a
        u, s, v = torch.linalg.svd(weight - round_trip(residual), full_matrices=False)
        kept = min(rank, len(s))  # a rank above the weight's own leaves the rest of B and A at zero
        root = s[:kept].sqrt()
        b[:, :kept], a[:kept] = u[:, :kept] * root, root[:, None] * v[:kept]
    return residual, b, a


@torch.no_grad()
def initialise(model: Any, iterations: int) -> None:
    """Give every LoRA layer on a 4-bit linear its LoftQ weights. ``model`` is a peft model; the base is read again in full."""
    from peft.tuners.lora import Linear4bit

    base = model.get_base_model()
    weights = full_precision(base)
    layers: dict[str, Any] = {name: module for name, module in base.named_modules() if isinstance(module, Linear4bit)}
    for name, layer in layers.items():
        linear = layer.get_base_layer()
        full = weights[f"{name}.weight"].to(linear.weight.device, torch.float32)
        residual, b, a = loftq(
            full, layer.r["default"], iterations, lambda w, like=linear: dequantised(quantised(w, like))
        )
        if iterations > 1:
            linear.weight = quantised(residual, linear)
        root = layer.scaling["default"] ** 0.5
        layer.lora_A["default"].weight.copy_(a / root)
        layer.lora_B["default"].weight.copy_(b / root)
        if "default" in layer.lora_variant:  # DoRA: its magnitudes are the norms of base plus adapter
            layer.lora_variant["default"].init(layer, adapter_name="default", config=model.peft_config["default"])


def full_precision(base: Any) -> dict[str, Tensor]:
    """The weights of a quantised model before quantisation, on the CPU, by name."""
    try:
        with without_bars():
            source = type(base).from_pretrained(base.name_or_path, dtype="auto")
    except OSError as error:
        raise ComponentError(
            "LoftQ needs the base's full-precision weights, and they cannot be read again",
            f"{base.name_or_path}: {error}",
            "Use a folder in the transformers format, or adapter.init_lora_weights=true.",
        ) from error
    return dict(source.named_parameters())


def quantised(weight: Tensor, like: Any) -> Any:
    """``weight`` rounded to 4 bits with the settings of the linear ``like``."""
    from bitsandbytes.nn.modules import Params4bit

    kind: Any = Params4bit  # its stub hides __new__'s arguments
    old = like.weight
    return kind(
        weight.contiguous(),
        requires_grad=False,
        quant_type=old.quant_type,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_storage=old.quant_storage,
        module=like,
    ).to(old.device)


def dequantised(weight: Any) -> Tensor:
    """A 4-bit weight as float32, (out, in)."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).to(torch.float32)


@torch.no_grad()
def save_base(model: Any, folder: Path) -> None:
    """Write the base of a peft model as a plain checkpoint that holds the values of the quantised weights."""
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    del config.quantization_config
    state = {}
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            continue
        value = dequantised(parameter) if hasattr(parameter, "quant_state") else parameter.data
        state[name.replace(".base_layer.", ".")] = value
    with torch.device("meta"):
        plain: nn.Module = type(base)(config)
    with without_bars():
        plain.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
