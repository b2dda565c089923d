"""Which token sees which: whether a packed batch keeps its documents apart, and masks of one's own, tried on the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ftrun.errors import ConfigError
from ftrun.models import varlen

if TYPE_CHECKING:
    from ftrun.data.batches import Batch

MASKED = ("sdpa", varlen.NAME, "eager")  # implementations that take a mask of four dimensions as it is
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


def masked_inputs(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The mask and the positions that the batch asks for, as arguments for the backbone.

    Raises ConfigError where the rows are longer than the window of a layer that attends to near tokens only: a mask
    from outside takes the window's place.
    """
    assert batch.attention is not None
    window = _window(model)
    real = batch.position_ids[batch.sequence >= 0]
    if window is not None and real.numel() and int(real.max()) >= window:
        raise ConfigError(
            f"layers of {type(model).__name__} see {window} tokens, and rows of {int(real.max()) + 1} come with a mask of their own",
            "a method that arranges what each token sees",
            f"Use data.max_length={window}, or a model without a window.",
        )
    mask = batch.attention[:, None]
    dtype = _float_mask(model)
    if dtype is not None:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    return {"attention_mask": mask, "position_ids": batch.position_ids}


def find_way(base: nn.Module, backbone: nn.Module) -> Way:
    """How this model keeps documents apart; ConfigError where it cannot."""
    ways: list[Way] = ["positions"]
    text_config: Any = base.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    windowed = getattr(text_config, "sliding_window", None) or getattr(text_config, "layer_types", None)
    if not windowed and _implementation(base) in MASKED:
        ways.append("mask")
    for way in ways:
        if _tried(base, backbone, way):
            return way
    raise ConfigError(
        f"{type(base).__name__} mixes the documents of a packed row",
        "train.packing=true",
        "Use train.packing=false.",
    )


def require_masks(base: nn.Module, backbone: nn.Module) -> None:
    """Raise ConfigError where this model cannot be told which token sees which, and where each stands."""
    if _implementation(base) not in MASKED:
        raise ConfigError(
            f"this method says which token sees which, and {_implementation(base)} takes no such mask",
            f"model.attention={_implementation(base)}",
            "Use model.attention=sdpa.",
        )
    if not _tried(base, backbone, "mask"):
        raise ConfigError(
            f"{type(base).__name__} does not heed a mask and positions from outside, which this method needs",
            todo="Use a model with rotary positions and full attention, such as Llama or Qwen2.",
        )


def _tried(base: nn.Module, backbone: nn.Module, way: Way) -> bool:
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        return _keeps_apart(base, backbone, way)
    finally:
        for module in training:
            module.training = True


def _window(model: nn.Module) -> int | None:
    """Tokens that the layer with the shortest sight sees; None: all."""
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    sizes = [getattr(text_config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if size), default=None)


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
