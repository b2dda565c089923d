"""Whether an adapter fits a model: every name that a user gives means something in it, and no rank is above its width.

peft passes over names that match nothing; here they are refused. All of it can be told from shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ftrun.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import nn

    from ftrun.models.architecture import Architecture

NAMES = ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules")
KEYWORDS = ("all-linear", "norms")


def check_names(adapter: Any, model: nn.Module, kinds: Iterable[str]) -> None:
    """Raise ConfigError for a name, pattern or layer of ``adapter`` that ``model`` does not have."""
    modules = [name for name, _ in model.named_modules() if name]
    for knob in NAMES:
        asked = getattr(adapter, knob, None) or []
        if isinstance(asked, str):
            if asked not in (*KEYWORDS, *kinds) and not any(_full_match(asked, name) for name in modules):
                raise _no_match(f"adapter.{knob}={asked}", asked, modules)
            continue
        for name in asked:
            if name not in kinds and not any(_ends_in(module, name) for module in modules):
                raise _no_match(f"adapter.{knob}", name, modules)
    for knob, asked in vars(adapter).items():
        for pattern in asked if knob.endswith("_pattern") and isinstance(asked, dict) else ():
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in modules):
                raise _no_match(f"adapter.{knob}", pattern, modules)


def check_layers(adapter: Any, architecture: Architecture) -> None:
    """Raise ConfigError for a layer that the model does not have."""
    asked = getattr(adapter, "layers_to_transform", None)
    have = len(architecture.layers)
    for layer in [asked] if isinstance(asked, int) else asked or []:
        if not 0 <= layer < have:
            raise ConfigError(
                f"there is no layer {layer}",
                "adapter.layers_to_transform",
                f"The model has the layers 0 to {have - 1}.",
            )


def check_tokens(adapter: Any, architecture: Architecture) -> None:
    """Raise ConfigError for a token that the model does not have."""
    for knob in ("token_indices", "trainable_token_indices"):
        asked = getattr(adapter, knob, None) or []
        for token in [one for some in asked.values() for one in some] if isinstance(asked, dict) else asked:
            if not 0 <= token < architecture.vocabulary:
                todo = f"The model has the tokens 0 to {architecture.vocabulary - 1}."
                raise ConfigError(f"there is no token {token}", f"adapter.{knob}", todo)


def check_rank(name: str, knob: str, rank: int | None, adapted: Iterable[nn.Module]) -> None:
    """Raise ConfigError for a rank above the width of every adapted linear."""
    widths = [max(layer.in_features, layer.out_features) for layer in adapted if hasattr(layer, "in_features")]  # type: ignore[call-overload]
    if rank is not None and widths and rank > max(widths):
        raise ConfigError(
            f"rank {rank} is above the width of every adapted layer, {max(widths)}: it adds parameters and nothing else",
            f"adapter={name} adapter.{knob}={rank}",
            f"Use adapter.{knob}={max(widths)} or less.",
        )


def check_bias(adapter: Any, model: nn.Module, adapted: Iterable[nn.Module]) -> None:
    """Raise ConfigError for biases that are to train and are not there."""
    asked = getattr(adapter, "bias", "none")
    if asked == "none":
        return
    own = any(getattr(layer, "bias", None) is not None for layer in adapted)
    anywhere = own or any(
        name.endswith(".bias") and "_" not in name.split(".")[-2] for name, _ in model.named_parameters()
    )
    if not (anywhere if asked == "all" else own):
        what = "this model has no biases" if asked == "all" else "the adapted layers have no biases"
        raise ConfigError(what, f"adapter.bias={asked}", "Use adapter.bias=none.")


def _ends_in(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"{pattern} is no regular expression: {error}", "adapter") from None


def _no_match(where: str, name: str, modules: list[str]) -> ConfigError:
    last = sorted({module.rpartition(".")[2] for module in modules} - {""})
    return ConfigError(
        f'no module of this model matches "{name}"', where, nearest(name, [n for n in last if not n.isdigit()])
    )
