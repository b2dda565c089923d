"""Methods of the library peft as adapters. peft is imported late: `check` must answer without it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.adapters.base import Adapter
from ftrun.errors import ComponentError, ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from ftrun.training.context import Context

KINDS = ("attention", "mlp", "q", "k", "v", "o", "gate", "up", "down")

# warnings of peft that a user can do nothing about, or that lora_start.py takes care of
SETTLED = (
    "lora with eva initialization",
    "Using Rank-Stabilized LoRA with rank_pattern",
    "`is_gradient_checkpointing` is deprecated",
    "Full backward hook is firing",
)


@dataclass
class PeftAdapter(Adapter):
    """Base of the methods that peft implements; a method gives its `peft_config`.

    ``merge`` needs the full-precision base: merging into 4-bit weights would round them again and change the logits.
    Load the base without quantisation, `load` the adapter on it, then merge.
    """

    mergeable: ClassVar[bool] = True

    def peft_config(self, ctx: Context) -> PeftConfig:
        raise NotImplementedError

    def attach(self, model: nn.Module, ctx: Context) -> nn.Module:
        from peft import get_peft_model

        with user_errors(self), seeded(ctx.seed), settled_warnings():
            config = self.peft_config(ctx)
            self.before_wrap(model, config, ctx)
            wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
            self.after_wrap(wrapped, ctx)
        wrapped.peft_config["default"].base_model_name_or_path = loadable_path(model)
        return wrapped

    def before_wrap(self, model: nn.Module, config: PeftConfig, ctx: Context) -> None:
        """Look at the base model before peft changes it."""

    def after_wrap(self, model: nn.Module, ctx: Context) -> None:
        """Finish the peft model: initialise, remember, hook."""

    def disabled(self, model: Any) -> AbstractContextManager[None] | None:
        return model.disable_adapter()

    def save(self, model: Any, folder: Path) -> Path:
        # False: with "auto" peft asks the hub for the base's vocabulary
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        return folder / "adapter"

    def load(self, model: Any, folder: Path) -> nn.Module:
        from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

        from ftrun.models.precision import NARROW, widen

        with settled_warnings():
            loaded = PeftModel.from_pretrained(model, folder / "adapter")
        trained = ("modules_to_save", "trainable_tokens")  # copies of base weights: peft gives them the base's dtype
        narrow = [p for name, p in loaded.named_parameters() if p.dtype in NARROW and any(t in name for t in trained)]
        if narrow:
            widen(narrow)
            set_peft_model_state_dict(loaded, load_peft_weights(str(folder / "adapter"), device="cpu"))
        return loaded

    def merge(self, model: Any) -> nn.Module:
        if not self.mergeable:
            raise ComponentError(
                f"adapter={self.name} cannot be merged: it is not a change of the weights",  # type: ignore[attr-defined]
                todo="Keep adapter/ beside the base model and load both with peft.",
            )
        if is_quantised(model):
            raise ComponentError(
                "merging into quantised weights would round them again and change the results",
                todo="Load the base with quant=none, load the adapter on it, and merge that.",
            )
        try:
            return model.merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ComponentError(
                f"peft cannot merge this adapter: {error}", todo="Load adapter/ with peft instead."
            ) from error


@contextmanager
def settled_warnings() -> Iterator[None]:
    """Without the warnings of peft in ``SETTLED``."""
    with warnings.catch_warnings():
        for settled in SETTLED:
            warnings.filterwarnings("ignore", message=settled)
        yield


def is_quantised(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)


def loadable_path(model: Any) -> str:
    """Where the base was loaded from: an absolute folder, or a hub id."""
    name = str(getattr(model, "name_or_path", ""))
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def task_type(ctx: Context) -> str:
    return {"causal": "CAUSAL_LM", "classify": "SEQ_CLS"}[ctx.settings.task]


def resolve_targets(targets: list[str] | str | None, ctx: Context) -> list[str] | str | None:
    """peft's ``target_modules``, with kinds of linears (attention, mlp, q, v ...) spelt out for this architecture.

    Names are given relative to their decoder layer, since peft skips ``layers_to_transform`` for full names.
    """
    names = [targets] if isinstance(targets, str) else targets or []
    kinds = [name for name in names if name in KINDS]
    if not kinds:
        return targets
    assert ctx.bundle is not None
    linears = ctx.bundle.architecture.linear_names(kinds)
    return sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in linears} | (set(names) - set(kinds)))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` inside, and the global generators untouched outside."""
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def user_errors(adapter: Adapter) -> Iterator[None]:
    """peft reports a wrong knob as ValueError or TypeError: make it a ConfigError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        name = adapter.name  # type: ignore[attr-defined]
        raise ConfigError(
            str(error).split("\n")[0], f"adapter={name}", f"Run: ftrun show --slot adapter {name}"
        ) from error
