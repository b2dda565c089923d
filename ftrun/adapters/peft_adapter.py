"""Methods of the library peft as adapters. peft is imported late: `check` must answer without it."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.adapters.base import Adapter
from ftrun.adapters.fitting import check_bias, check_layers, check_names, check_rank, check_tokens
from ftrun.adapters.peft_limits import RANKS
from ftrun.errors import ComponentError, ConfigError
from ftrun.models.source import safe_adapter

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from ftrun.training.context import Context

KINDS = ("attention", "mlp", "q", "k", "v", "o", "gate", "up", "down")

# warnings of peft that a user can do nothing about, or that lora_start.py and tied_weights.py take care of
SETTLED = (
    "lora with eva initialization",
    "Using Rank-Stabilized LoRA with rank_pattern",
    "`is_gradient_checkpointing` is deprecated",
    "Full backward hook is firing",
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    "Model with `tie_word_embeddings=True` and the tied_target_modules",
    "Input and output embeddings are no longer tied after merging",
    "Unsupported layer type",  # a norm of a class that peft does not know by name
    "Failed to load the CUDA extension",
    "Detected that the base layer has no bias term",
    "The following rank_pattern keys did not match",  # AdaLoRA's own; those of a user were looked up before
    "Adapter 'default': \\d+ LoRA tensor\\(s\\) have invalid shape",  # of rank 0
    "Sparse invariant checks are implicitly disabled",
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

        assert ctx.bundle is not None
        check_names(self, model, KINDS)
        check_layers(self, ctx.bundle.architecture)
        check_tokens(self, ctx.bundle.architecture)
        with user_errors(self), seeded(ctx.seed), settled_warnings():
            config = self.peft_config(ctx)
            self.before_wrap(model, config, ctx)
            wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
            self.check_layers_of(wrapped)
            self.after_wrap(wrapped, ctx)
        name_base(wrapped.peft_config["default"], model)
        return wrapped

    def check_layers_of(self, model: nn.Module) -> None:
        """Raise ConfigError for knobs that what was adapted gives no meaning to: a rank above its width, biases it lacks."""
        adapted = adapted_layers(model)
        knob = RANKS.get(self.name)  # type: ignore[attr-defined]
        if knob is not None:
            check_rank(self.name, knob, getattr(self, knob), adapted)  # type: ignore[attr-defined]
        check_bias(self, model, adapted)

    def before_wrap(self, model: nn.Module, config: PeftConfig, ctx: Context) -> None:
        """Look at the base model before peft changes it."""

    def after_wrap(self, model: nn.Module, ctx: Context) -> None:
        """Finish the peft model: initialise, remember, hook."""

    def go_on(self, model: Any, ctx: Context, folder: Path) -> nn.Module:
        from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
        from peft.utils.save_and_load import load_peft_weights

        source = safe_adapter(folder / "adapter")
        saved = load_peft_weights(str(source), device="cpu")
        with user_errors(self), seeded(ctx.seed), settled_warnings():
            config = PeftConfig.from_pretrained(str(source))
            if config.is_prompt_learning:  # peft loads prompts for inference only
                config.inference_mode = False
                wrapped: Any = get_peft_model(model, config)
                put_in = functools.partial(set_peft_model_state_dict, wrapped, saved)
            else:
                put_in = functools.partial(PeftModel.from_pretrained, model, source, is_trainable=True)
            try:
                loaded = put_in()
            except RuntimeError as error:
                what = "the adapter does not fit this model"
                if config.is_prompt_learning:
                    what = f"{source} holds the trained prompts, not the network that made them"
                raise ConfigError(what, f"run={folder}", " ".join(str(error).split())[:300]) from error
            wrapped = wrapped if config.is_prompt_learning else _unrounded(loaded, source)
        have = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        if odd := sorted(saved.keys() ^ have.keys()):
            raise ConfigError("the adapter does not belong to this model", f"{source}: {', '.join(odd[:3])}")
        if any(not value.to(have[name]).equal(have[name]) for name, value in saved.items()):
            raise ConfigError(
                f"{source} holds the trained prompts, not the network that made them", f"run={folder}", "Train it anew."
            )
        name_base(wrapped.peft_config["default"], model)
        self._begun = {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}
        return wrapped

    def disabled(self, model: Any) -> AbstractContextManager[None] | None:
        begun = getattr(self, "_begun", None)
        return put_back(model, begun) if begun is not None else model.disable_adapter()

    def save(self, model: Any, folder: Path) -> Path:
        # False: with "auto" peft asks the hub for the base's vocabulary
        with _named_after(model.get_base_model(), model.peft_config["default"]), settled_warnings():
            model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        _name_base_in_card(folder / "adapter" / "README.md", model.peft_config["default"])
        return folder / "adapter"

    def load(self, model: Any, folder: Path) -> nn.Module:
        from peft import PeftModel

        with settled_warnings():
            return _unrounded(PeftModel.from_pretrained(model, safe_adapter(folder / "adapter")), folder / "adapter")

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
        from ftrun.adapters.tied_weights import told_apart

        try:
            with told_apart(model), settled_warnings():
                return model.merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ComponentError(
                f"peft cannot merge this adapter: {error}", todo="Load adapter/ with peft instead."
            ) from error


def _unrounded(loaded: Any, source: Path) -> Any:
    """The model with what ``source`` holds in float32, where peft has given it the dtype of the base."""
    from peft import load_peft_weights, set_peft_model_state_dict

    from ftrun.models.precision import NARROW, widen

    trained = ("modules_to_save", "trainable_tokens")  # copies of base weights
    narrow = [p for name, p in loaded.named_parameters() if p.dtype in NARROW and any(t in name for t in trained)]
    if narrow:
        widen(narrow)
        set_peft_model_state_dict(loaded, load_peft_weights(str(source), device="cpu"))
    return loaded


@contextmanager
def put_back(model: nn.Module, start: dict[str, Tensor]) -> Iterator[None]:
    """Trained parameters hold their starting values inside."""
    changed = [
        (parameter, parameter.data, start[name]) for name, parameter in model.named_parameters() if name in start
    ]
    for parameter, _, before in changed:
        parameter.data = before
    try:
        yield
    finally:
        for parameter, trained, _ in changed:
            parameter.data = trained


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


def base_of(model: Any) -> tuple[str, str | None]:
    """Name and revision of the base, as others can load it: a hub id and its commit, or a folder (models/source.py)."""
    return str(model.config._name_or_path or ""), getattr(model.config, "_commit_hash", None)


def name_base(config: PeftConfig, model: Any) -> None:
    """Say in an adapter's config what it belongs to."""
    config.base_model_name_or_path, config.revision = base_of(model)


@contextmanager
def _named_after(base: Any, config: PeftConfig) -> Iterator[None]:
    """peft tags a model card with the folder that the base was read from: inside, the base goes by its name."""
    folder, base.name_or_path = base.name_or_path, config.base_model_name_or_path
    try:
        yield
    finally:
        base.name_or_path = folder


def _name_base_in_card(card: Path, config: PeftConfig) -> None:
    name, revision = config.base_model_name_or_path, config.revision
    blank = "**Finetuned from model [optional]:** [More Information Needed]"
    said = f"**Finetuned from model:** {name}" + (f", revision {revision}" if revision else "")
    card.write_text(card.read_text().replace(blank, said))


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the base that peft has put something on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]


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
        what = " ".join(str(error).split())
        raise ConfigError(what, _knobs_in(what, adapter), f"Run: ftrun show --slot adapter {name}") from error


def _knobs_in(what: str, adapter: Any) -> str:
    """The adapter, and those of its knobs that an error of peft speaks of."""
    said = what.lower().replace(" ", "_")
    named = [knob for knob in vars(adapter) if not knob.startswith("_") and len(knob) > 1 and knob.lower() in said]
    return " ".join([f"adapter={adapter.name}", *(f"adapter.{knob}={getattr(adapter, knob)}" for knob in named)])
