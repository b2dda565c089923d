"""What an adapter is: it decides which parameters train, and how the result is saved and merged."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from ftrun.config.settings import Settings
    from ftrun.training.context import Context


@dataclass
class Adapter:
    """Base of adapters. A subclass overrides what its method needs; the defaults are those of full fine-tuning.

    ``needs`` and ``lacks`` are explained in config/capabilities.py.
    """

    needs: ClassVar[dict[str, str]] = {}
    lacks: ClassVar[dict[str, str]] = {}
    changes_trainable: ClassVar[bool] = False  # freezes and unfreezes between steps: DDP must expect unused parameters

    def check(self, settings: Settings) -> None:
        """Refuse knobs that cannot work with the rest of the config. Called before torch is imported: keep it light."""

    def attach(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Make the right parameters trainable, add modules where the method has some, and return the model to train."""
        raise NotImplementedError

    def bind(self, optimizer: Optimizer) -> None:
        """Learn of the optimiser, which was built while every candidate parameter was trainable."""

    def before_step(self, step: int) -> None:
        """Called before the first micro-batch of optimiser step ``step`` (from 0)."""

    def after_step(self, step: int) -> None:
        """Called after the optimiser has stepped."""

    def disabled(self, model: nn.Module) -> AbstractContextManager[None] | None:
        """A context in which the model computes what the base model computes; None where the base is gone."""
        return None

    def save(self, model: nn.Module, folder: Path) -> Path:
        """Write what a stranger loads elsewhere, below ``folder``: adapter/ (peft format) or model/. Returns that folder."""
        raise NotImplementedError

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The trained model from a freshly loaded base ``model`` and what ``save`` wrote below the same ``folder``."""
        raise NotImplementedError

    def go_on(self, model: nn.Module, ctx: Context, folder: Path) -> nn.Module:
        """The model to train on: a freshly loaded base ``model`` with what ``save`` wrote below ``folder``, in place of `attach`.

        What the model computes then is what ``disabled`` gives back. Raises ConfigError where a method cannot go on.
        """
        name = self.name  # type: ignore[attr-defined]
        raise ConfigError(
            f"adapter={name} cannot go on from a trained one",
            f"run={folder}",
            f"Merge it, ftrun merge run={folder}, and give model.path={folder / 'model'}.",
        )

    def merge(self, model: nn.Module) -> nn.Module:
        """The trained model as a plain model of its architecture. Raises ComponentError where that is impossible."""
        return model

    def state_dict(self) -> dict[str, Any]:
        """The method's own state beside the weights (plain values and tensors), for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``; called after ``bind`` and before the first step."""
