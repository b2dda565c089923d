"""Prefix tuning: learned keys and values in front of every layer's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ftrun.adapters.peft_adapter import PeftAdapter, task_type
from ftrun.errors import ConfigError
from ftrun.registry import register

if TYPE_CHECKING:
    from peft import PrefixTuningConfig

    from ftrun.config.settings import Settings
    from ftrun.training.context import Context


@register("adapter", "prefix_tuning")
@dataclass
class PrefixTuning(PeftAdapter):
    """Prefix-tuning (Li and Liang, 2021, arXiv:2101.00190).

    Every layer attends to ``num_virtual_tokens`` trained key-value pairs before the text. The untrained prefix already
    takes part in the softmax, so the model is not the base model at the start; not even with zeros.
    """

    mergeable: ClassVar[bool] = False

    num_virtual_tokens: int = 20  # length of the prefix
    prefix_projection: bool = False  # train the prefix through a two-layer network, as the paper does
    encoder_hidden_size: int | None = None  # width of that network; null: the model's own
    init_weights: Literal["random", "zero"] = "random"  # start of the prefix

    def check(self, settings: Settings) -> None:
        if self.num_virtual_tokens < 1:
            raise ConfigError("adapter.num_virtual_tokens must be 1 or more", f"it is {self.num_virtual_tokens}")
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ConfigError(
                "adapter.encoder_hidden_size has no effect",
                "adapter=prefix_tuning",
                "Add adapter.prefix_projection=true.",
            )
        if settings.task == "classify":
            raise ConfigError(
                "adapter=prefix_tuning works on causal language models only", "task=classify", "Use adapter=lora."
            )
        if settings.train.gradient_checkpointing:
            raise ConfigError(
                "adapter=prefix_tuning feeds its prefix through the key-value cache, which gradient checkpointing cannot recompute",
                "train.gradient_checkpointing=true",
                "Use train.gradient_checkpointing=false, or adapter=lora.",
            )
        if settings.train.packing:
            raise ConfigError(
                "adapter=prefix_tuning puts one prefix in front of each row, and packed rows hold several texts",
                "train.packing=true",
                "Use train.packing=false, or adapter=lora.",
            )

    def peft_config(self, ctx: Context) -> PrefixTuningConfig:
        from peft import PrefixTuningConfig

        width = self.encoder_hidden_size
        if self.prefix_projection and width is None:
            assert ctx.bundle is not None
            width = ctx.bundle.architecture.width
        return PrefixTuningConfig(
            task_type=task_type(ctx),
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_projection=self.prefix_projection,
            encoder_hidden_size=width,  # type: ignore[arg-type]
            init_weights="zero" if self.init_weights == "zero" else None,
        )
