"""AdaLoRA: a low-rank change as a singular value decomposition whose ranks are shared out while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftrun.adapters.peft_type import PeftType
from ftrun.errors import ConfigError
from ftrun.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ftrun.config.settings import Settings
    from ftrun.training.context import Context

UNKNOWN_LENGTH = 10**9  # steps, where only shapes are looked at
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


@register("adapter", "adalora")
@dataclass
class AdaLora(PeftType):
    """Adaptive budget allocation (Zhang et al., 2023, arXiv:2303.10512).

    ``W x`` becomes ``W x + (lora_alpha / rank) P diag(E) Q x`` with P and Q kept near orthogonal by a penalty of
    ``orth_reg_weight * mean ||P'P - I||``. Every linear starts with ``init_r`` triplets; after ``tinit`` steps the
    least important ones of the whole model are zeroed every ``deltaT`` steps, by the smoothed ``|weight * gradient|``
    and its uncertainty, on a cubic schedule that ends ``tfinal`` steps before the run with ``target_r`` on average.
    """

    def check(self, settings: Settings) -> None:
        super().check(settings)
        knobs: Any = self
        if not 0 < knobs.target_r < knobs.init_r:
            raise ConfigError(
                "AdaLoRA starts with more rank than it ends with",
                f"adapter.init_r={knobs.init_r} adapter.target_r={knobs.target_r}",
                "Use 0 < target_r < init_r.",
            )
        for knob, low in (("deltaT", 1), ("tinit", 0), ("tfinal", 0)):
            if getattr(self, knob) < low:
                raise ConfigError(f"adapter.{knob} must be {low} or more", f"adapter.{knob}={getattr(self, knob)}")

    def peft_config(self, ctx: Context) -> Any:
        knobs: Any = self
        steps = ctx.planned_steps() or UNKNOWN_LENGTH
        if knobs.tinit + knobs.tfinal >= steps:
            raise ConfigError(
                f"AdaLoRA has no step left to share out its budget: the run has {steps}",
                f"adapter.tinit={knobs.tinit} adapter.tfinal={knobs.tfinal}",
                "Train longer, or lower them.",
            )
        self._total = steps
        return super().peft_config(ctx)

    def further(self) -> dict[str, Any]:
        return {"total_step": self._total}

    def before_step(self, step: int) -> None:
        """Put the gradient of the penalty where those of the batches are added to it, before they are clipped.

        peft adds the penalty to a loss that it computes itself, which no run here asks it for.
        """
        super().before_step(step)
        knobs: Any = self
        if knobs.orth_reg_weight == 0:
            return
        parts = [(name, p) for name, p in self._model.named_parameters() if ".lora_A." in name or ".lora_B." in name]
        parts = [(name, p) for name, p in parts if p.requires_grad and not p.is_meta]
        if not parts:
            return
        with torch.enable_grad():
            penalty = (
                knobs.orth_reg_weight * torch.stack([_distance(p, ".lora_A." in name) for name, p in parts]).mean()
            )
            gradients = torch.autograd.grad(penalty / self._processes, [p for _, p in parts])
        for (_, parameter), gradient in zip(parts, gradients, strict=True):
            parameter.grad = gradient

    def after_wrap(self, model: nn.Module, ctx: Context) -> None:
        for name, parameter in model.named_parameters():
            if ".ranknum." in name:  # the divisor of a linear's change
                parameter.requires_grad_(False)
        super().after_wrap(model, ctx)
        self._processes = ctx.team.world_size  # gradients of all of them are added up

    def save(self, model: Any, folder: Path) -> Path:
        """As peft does, without the triplets that are zero; with all of them where the zeroed ones have moved since."""
        config = model.peft_config["default"]
        pattern = config.rank_pattern
        if pattern is not None and any(
            p.detach().view(-1)[~torch.tensor(_kept(pattern, name), device=p.device)].any()
            for name, p in model.base_model.model.named_parameters()
            if ".lora_E." in name
        ):
            config.rank_pattern = None
        try:
            return super().save(model, folder)
        finally:
            config.rank_pattern = pattern

    def state_dict(self) -> dict[str, Any]:
        allocator = self._model.base_model.rankallocator
        averages = {name: dict(getattr(allocator, name)) for name in AVERAGES}
        return super().state_dict() | averages | {"rank_pattern": self._model.peft_config["default"].rank_pattern}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        allocator = self._model.base_model.rankallocator
        where = {name: p.device for name, p in self._model.base_model.model.named_parameters()}
        for name in AVERAGES:
            setattr(allocator, name, {key: value.to(where[key]) for key, value in state[name].items()})
        self._model.peft_config["default"].rank_pattern = state["rank_pattern"]


def _distance(matrix: Tensor, wide: bool) -> Tensor:
    """How far the rows (``wide``) or columns of a matrix are from orthonormal."""
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    return torch.linalg.norm(gram - torch.eye(len(gram), device=matrix.device))


def _kept(pattern: dict[str, list[bool]], name: str) -> list[bool]:
    """Which triplets stay; peft drops the adapter's name from the keys when it has saved."""
    return pattern[name] if name in pattern else pattern[name.replace(".default", "")]
