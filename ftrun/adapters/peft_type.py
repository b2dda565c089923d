"""What a type of peft does when it runs, whatever it is called; its knobs come from peft_types.py."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.adapters import peft_limits as limits
from ftrun.adapters.peft_adapter import PeftAdapter, adapted_layers, put_back, resolve_targets, task_type
from ftrun.adapters.peft_types import config_class
from ftrun.errors import CheckpointError, ComponentError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from ftrun.config.settings import Settings
    from ftrun.training.context import Context

# what peft raises for a model or a knob that it has no message for
FAILURES = (NotImplementedError, AssertionError, AttributeError, KeyError, IndexError, ZeroDivisionError, RuntimeError)
SEEDS = ("random_seed", "random_loc_seed")  # where peft leaves them open they are the run's


@contextmanager
def failures(name: str) -> Iterator[None]:
    """peft fails somewhere inside for what it does not foresee: make it a ConfigError. Without weights it may fail for that."""
    try:
        yield
    except FAILURES as error:
        said = " ".join(str(error).split())
        if any(word in said for word in ("meta", "memory", "allocate")):
            raise
        raise ConfigError(
            f"peft cannot put adapter={name} on this model: {said[:200]}",
            f"adapter={name}",
            f"Run: ftrun show --slot adapter {name}",
        ) from error


def plain(value: Any) -> str:
    """A value as one types it."""
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if not isinstance(value, list)
        else str(value)
    )


@dataclass
class PeftType(PeftAdapter):
    """Base of the types of peft; the class of one is made from it and from its knobs (registry.py)."""

    name: ClassVar[str]  # what the registry calls it

    def check(self, settings: Settings) -> None:
        asked = {
            "quant=nf4": settings.choice("quant") == "nf4",
            "quant=int8": settings.choice("quant") == "int8",
            "train.gradient_checkpointing=true": settings.train.gradient_checkpointing,
            "train.packing=true": bool(settings.train.packing),
            "train.merge=true": settings.train.merge,
            "task=classify": settings.task == "classify",
        }
        for setting, wanted in asked.items():
            if wanted and (reason := limits.cannot(self.name, setting)):
                raise ConfigError(f"adapter={self.name} {reason}", setting, limits.WAYS_OUT[setting])
        self._check_needed()

    def _check_needed(self) -> None:
        """Refuse a run without what peft has no default for, and what peft would pass over."""
        for knob, what in limits.NEEDED.get(self.name, {}).items():
            if not getattr(self, knob):
                raise ConfigError(f"adapter={self.name} needs {what}", f"adapter.{knob}", f"Set adapter.{knob}=...")
        for knob, (other, wanted) in limits.ONLY_WITH.get(self.name, {}).items():
            have = getattr(self, other)
            if getattr(self, knob) != self._default(knob) and (not have if wanted is None else have != wanted):
                way_out = f"Add adapter.{other}={'...' if wanted is None else plain(wanted)}."
                raise ConfigError(f"adapter.{knob} has no effect", f"adapter.{other}={plain(have)}", way_out)
        for knob, (value, why) in limits.NOT_THAT.get(self.name, {}).items():
            if getattr(self, knob) == value:
                raise ConfigError(
                    f"adapter={self.name} {why}", f"adapter.{knob}={plain(value)}", "Leave it at its default."
                )
        if getattr(self, "layers_pattern", None) is not None and self.layers_to_transform is None:  # type: ignore[attr-defined]
            raise ConfigError("adapter.layers_pattern has no effect", todo="Add adapter.layers_to_transform=[...].")

    def _default(self, knob: str) -> Any:
        (field,) = (field for field in dataclasses.fields(self) if field.name == knob)
        return field.default_factory()  # type: ignore[misc]

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        return not limits.cannot(self.name, "train.merge=true")

    def peft_config(self, ctx: Context) -> Any:
        wanted = config_class(self.name)
        known = inspect.signature(wanted).parameters
        knobs = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        knobs |= {name: value for name, value in limits.SET.items() if name in known}
        if "target_modules" in knobs:
            knobs["target_modules"] = self.targets(ctx)
        for name in SEEDS:
            if name in knobs and knobs[name] is None:
                knobs[name] = ctx.seed
        for name, value in knobs.items():
            default = known[name].default
            if isinstance(default, enum.Enum):  # peft reads its own kind and not the text that it takes for it
                knobs[name] = type(default)(value)
        if "tokenizer_name_or_path" in known:
            knobs["tokenizer_name_or_path"] = getattr(ctx.bundle.tokenizer, "name_or_path", None)  # type: ignore[union-attr]
        if self.name in limits.LAYERS and knobs[limits.LAYERS[self.name]] is None:
            knobs[limits.LAYERS[self.name]] = len(ctx.bundle.architecture.layers)  # type: ignore[union-attr]
        return wanted(task_type=task_type(ctx), **knobs | self.further())

    def further(self) -> dict[str, Any]:
        """What else peft's config is given, that is no knob."""
        return {}

    def targets(self, ctx: Context) -> list[str] | str | None:
        """peft's ``target_modules``: what the method adapts, unless the user names others."""
        asked: Any = self.target_modules  # type: ignore[attr-defined]
        assert ctx.bundle is not None
        if asked == "all-linear":
            return resolve_targets(["attention", "mlp"], ctx)
        if asked == "norms":
            architecture = ctx.bundle.architecture
            norms: set[str] = {*architecture.norms, *filter(None, [architecture.final_norm])}
            return sorted(norms)
        return resolve_targets(asked, ctx)

    def attach(self, model: nn.Module, ctx: Context) -> nn.Module:
        self._of_base = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        with warnings.catch_warnings(record=True) as said, failures(self.name):
            warnings.simplefilter("always")
            wrapped = super().attach(model, ctx)
        for warning in said:
            self._read(str(warning.message))
        return wrapped

    def go_on(self, model: Any, ctx: Context, folder: Path) -> nn.Module:
        if reason := limits.cannot(self.name, "run=RUN"):
            raise ConfigError(f"adapter={self.name} {reason}", f"run={folder}", limits.WAYS_OUT["run=RUN"])
        self._of_base = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        wrapped = super().go_on(model, ctx, folder)
        self.after_wrap(wrapped, ctx)
        return wrapped

    def _read(self, said: str) -> None:
        """Refuse what peft has only warned of, that it takes another value than it was given; pass on the rest."""
        turned = re.search(r"Setting `?(\w+)`? to (\w+)", said)
        if turned and str(getattr(self, turned[1], turned[2])) == turned[2]:
            return
        if turned or any(word in said for word in limits.PASSED_OVER):
            raise ConfigError(
                " ".join(said.split()), f"adapter={self.name}", f"Run: ftrun show --slot adapter {self.name}"
            )
        warnings.warn(said, stacklevel=3)

    def check_layers_of(self, model: nn.Module) -> None:
        super().check_layers_of(model)
        for knob in limits.NEEDS_BIAS.get(self.name, ()):
            biased = any(getattr(layer, "bias", None) is not None for layer in adapted_layers(model))
            if not biased and getattr(self, knob) != self._default(knob):
                raise ConfigError(
                    "the adapted layers have no biases: the knob has no effect",
                    f"adapter.{knob}={getattr(self, knob)}",
                    "Leave it at its default.",
                )

    def after_wrap(self, model: nn.Module, ctx: Context) -> None:
        self._model: Any = model
        self._trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self._start = None
        if getattr(self, "bias", "none") != "none":  # peft cannot switch trained biases off
            self._start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def bind(self, optimizer: Optimizer) -> None:
        """Some types look at the gradients of a step, after it was made and before they are gone."""
        self._step = 0
        tuner = self._model.base_model
        if hasattr(tuner, "update_and_allocate"):
            optimizer.register_step_post_hook(lambda *_: tuner.update_and_allocate(self._step + 1))

    def before_step(self, step: int) -> None:
        self._step = step

    def disabled(self, model: Any) -> AbstractContextManager[None] | None:
        start = getattr(self, "_start", None)
        return put_back(model, start) if start is not None else super().disabled(model)

    def merge(self, model: Any) -> nn.Module:
        """The merged model, after it has computed what the adapted one did."""
        import torch

        ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
        model.eval()
        with torch.no_grad():
            before = model(input_ids=ids, use_cache=False).logits
            merged = super().merge(model)
            after = merged(input_ids=ids, use_cache=False).logits
        near = 1e-3 if before.dtype == torch.float32 else 0.1
        if not (after - before).abs().max() <= near * (1 + before.abs().max()):
            raise ComponentError(
                f"the merged model computes something else than adapter={self.name}",
                todo="Load adapter/ with peft instead.",
            )
        return merged

    # ---- what peft keeps beside the parameters that train ----

    def state_dict(self) -> dict[str, Any]:
        """Masks, indices, projections and averages: a resumed run computes with these, not with some drawn anew."""
        state: dict[str, Any] = {"tensors": dict(self._kept())}
        trained = set(self._trained)
        resting = [name for name, p in self._model.named_parameters() if name in trained and not p.requires_grad]
        return state | {"resting": resting, "start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        have = dict(self._kept())
        for name, saved in state["tensors"].items():
            if name not in have or have[name].shape != saved.shape:
                raise CheckpointError(
                    f"adapter={self.name} keeps something else here than in the checkpoint",
                    name,
                    "Resume with the command that started the run.",
                )
            have[name].data.copy_(saved)
        named = dict(self._model.named_parameters())
        for name in self._trained:
            named[name].requires_grad_(name not in state["resting"])
        if self._start is not None:
            self._start = {name: saved.to(self._start[name]) for name, saved in state["start"].items()}

    def _kept(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the adapter that do not train, by name: buffers, frozen parameters, and those in plain tables."""
        import torch

        if self.name in limits.MADE_OF_BASE:
            return
        trained = set(self._trained)
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            if id(tensor) not in self._of_base and name not in trained:
                yield name, tensor
        for at, module in self._model.named_modules():
            if type(module).__module__.startswith("peft."):
                for attribute, table in vars(module).items():
                    if isinstance(table, dict) and not attribute.startswith("_"):
                        for key, value in table.items():
                            if isinstance(value, torch.Tensor):
                                yield f"{at}.{attribute}.{key}", value
