"""Prefix tuning: learned keys and values in front of every layer's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftrun.adapters.peft_adapter import PeftAdapter, task_type
from ftrun.errors import ConfigError
from ftrun.registry import register

if TYPE_CHECKING:
    from peft import PrefixTuningConfig
    from torch import nn

    from ftrun.config.settings import Settings
    from ftrun.context import Context


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
            raise ConfigError("adapter.encoder_hidden_size has no effect", "adapter=prefix_tuning", "Add adapter.prefix_projection=true.")
        if settings.task == "classify":
            raise ConfigError("adapter=prefix_tuning works on causal language models only", "task=classify", "Use adapter=lora.")
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
            width = ctx.bundle.model.config.hidden_size  # type: ignore[union-attr]
        return PrefixTuningConfig(
            task_type=task_type(ctx),
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_projection=self.prefix_projection,
            encoder_hidden_size=width,  # type: ignore[arg-type]
            init_weights="zero" if self.init_weights == "zero" else None,
        )

    def after_wrap(self, model: nn.Module, ctx: Context) -> None:
        self._hook(model)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        loaded = super().load(model, folder)
        self._hook(loaded)
        return loaded

    def disabled(self, model: nn.Module) -> AbstractContextManager[None]:
        return self._switched_off(model)

    @contextmanager
    def _switched_off(self, model: Any) -> Iterator[None]:
        self._off = True
        try:
            with model.disable_adapter():
                yield
        finally:
            self._off = False

    def _hook(self, model: Any) -> None:
        """Give the prefix to the decoder also where it is called directly, without peft's own forward."""
        import torch

        self._off = False
        length = self.num_virtual_tokens

        def add_prefix(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if self._off or kwargs.get("past_key_values") is not None:
                return None  # peft's forward, or a later step of generation: the prefix is there already
            tokens = args[0] if args else kwargs.get("input_ids")
            rows = (kwargs["inputs_embeds"] if tokens is None else tokens).shape[0]
            added: dict[str, Any] = {"past_key_values": model.get_prompt(batch_size=rows)}
            if kwargs.get("position_ids") is not None:
                added["position_ids"] = kwargs["position_ids"] + length
            mask = kwargs.get("attention_mask")
            if mask is not None:
                added["attention_mask"] = torch.cat([mask.new_ones(rows, length), mask], dim=1)
            return args, kwargs | added

        model.get_base_model().base_model.register_forward_pre_hook(add_prefix, with_kwargs=True)
