"""IA3: learned scales on keys, values and feed-forward activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.adapters.peft_adapter import PeftAdapter, resolve_targets, task_type
from ftrun.errors import ConfigError
from ftrun.registry import register

if TYPE_CHECKING:
    from peft import IA3Config

    from ftrun.config.settings import Settings
    from ftrun.training.context import Context


@register("adapter", "ia3")
@dataclass
class Ia3(PeftAdapter):
    """Infused adapter by inhibiting and amplifying inner activations (Liu et al., 2022, arXiv:2205.05638).

    Each adapted linear gets one vector ``l``, ones at the start: attention linears give ``l * (W x)``, feed-forward
    linears give ``W (l * x)``. A few thousand numbers train; they want a learning rate near 3e-3.
    """

    target_modules: list[str] | str | None = (
        None  # linears to scale; null: keys, values and the last feed-forward linear
    )
    feedforward_modules: list[str] | str | None = None  # the targets that are scaled at their input
    exclude_modules: list[str] | str | None = None  # linears to leave alone
    modules_to_save: list[str] | None = None  # other modules that train whole and are saved
    init_ia3_weights: bool = True  # start at ones; false starts at random and changes the model at once

    def check(self, settings: Settings) -> None:
        if self.target_modules is not None and self.feedforward_modules is None:
            raise ConfigError(
                "adapter.target_modules needs adapter.feedforward_modules beside it",
                "adapter=ia3",
                "Name the targets that are scaled at their input, for example [down_proj]; [] if none is.",
            )

    def peft_config(self, ctx: Context) -> IA3Config:
        from peft import IA3Config

        return IA3Config(
            task_type=task_type(ctx),
            target_modules=resolve_targets(self.target_modules, ctx),
            feedforward_modules=resolve_targets(self.feedforward_modules, ctx),
            exclude_modules=self.exclude_modules,
            modules_to_save=self.modules_to_save,
            init_ia3_weights=self.init_ia3_weights,
        )
