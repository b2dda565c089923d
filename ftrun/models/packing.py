"""Whether a packed batch keeps its documents apart, tried on the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ftrun.errors import ConfigError
from ftrun.models import varlen

if TYPE_CHECKING:
    from ftrun.data.batches import Batch

Way = Literal["positions", "mask"]  # transformers reads the restarting positions, or has to be given the mask


def packed_inputs(batch: Batch, way: Way, model: nn.Module) -> dict[str, Tensor]:
    """What keeps the documents of a packed batch apart, as arguments for the backbone."""
    inputs = {"position_ids": batch.position_ids}
    if _implementation(model) == varlen.NAME and len(batch.position_ids) == 1:
        inputs["cu_seq_lens_q"] = varlen.document_bounds(batch.position_ids)
    if way == "mask":
        inputs["attention_mask"] = block_diagonal(batch.position_ids, _float_mask(model))
    return inputs


def block_diagonal(position_ids: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Causal mask within documents, (rows, 1, time, time): boolean, or with a dtype 0 and its lowest number.

    A document starts wherever the position does not follow the one before it.
    """
    time = position_ids.shape[1]
    document = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)
    seen = (document[:, None, :, None] == document[:, None, None, :]) & torch.ones(
        time, time, dtype=torch.bool, device=position_ids.device
    ).tril()
    if dtype is None:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def find_way(base: nn.Module, backbone: nn.Module) -> Way:
    """How this model keeps documents apart; ConfigError where it cannot."""
    ways: list[Way] = ["positions"]
    text_config: Any = base.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    windowed = getattr(text_config, "sliding_window", None) or getattr(text_config, "layer_types", None)
    if not windowed and _implementation(base) in ("sdpa", varlen.NAME, "eager"):
        ways.append("mask")
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        for way in ways:
            if _keeps_apart(base, backbone, way):
                return way
    finally:
        for module in training:
            module.training = True
    raise ConfigError(
        f"{type(base).__name__} mixes the documents of a packed row",
        "train.packing=true",
        "Use train.packing=false.",
    )


@torch.no_grad()
def _keeps_apart(base: nn.Module, backbone: nn.Module, way: Way) -> bool:
    """A document of five tokens must have the same states whatever stands before it, and those it has alone."""
    device, dtype = next((p.device, p.dtype) for p in backbone.parameters() if p.is_floating_point())
    ids = torch.arange(3, 18, device=device) % base.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    one, other, document = ids.unsqueeze(0).split(5, dim=1)
    positions = torch.arange(5, device=device).repeat(2).unsqueeze(0)
    extra: dict[str, Tensor] = {"position_ids": positions}
    if way == "mask":
        extra["attention_mask"] = block_diagonal(positions, _float_mask(base))

    def states(*parts: Tensor, **extra: Tensor) -> Tensor:
        return backbone(input_ids=torch.cat(parts, 1), use_cache=False, **extra).last_hidden_state[:, -5:].float()

    try:
        after_one, after_other = states(one, document, **extra), states(other, document, **extra)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # the family does not take such arguments
    alone, leaked = states(document), states(one, document)
    # equal shapes round equally but for mixtures of experts, whose products depend on who else is routed where
    untouched = (after_one - after_other).norm() <= 4 * torch.finfo(dtype).eps * alone.norm()
    # products of other shapes round differently; a document at a wrong position would be as far off as a leak
    placed = (after_one - alone).norm() <= 0.1 * (leaked - alone).norm()
    return bool(untouched and placed)


def _float_mask(model: nn.Module) -> torch.dtype | None:
    """Eager attention adds its mask to the scores; sdpa takes a boolean one."""
    if _implementation(model) in ("sdpa", varlen.NAME):
        return None
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _implementation(model: nn.Module) -> str:
    config: Any = model.config
    return config.get_text_config(decoder=True)._attn_implementation
