"""LoRA and its variants."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftrun.adapters.base import Adapter
from ftrun.adapters.peft_adapter import PeftAdapter, put_back, resolve_targets, task_type
from ftrun.adapters.plain_weights import load_again
from ftrun.errors import CheckpointError, ComponentError, ConfigError, nearest
from ftrun.registry import register

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig
    from torch import Tensor, nn

    from ftrun.config.settings import Settings
    from ftrun.training.context import Context

PLAIN_INITS = ("true", "false", "gaussian", "eva")  # leave the base alone, and need only its outputs
FULL_INITS = ("orthogonal", "mica", "pissa", "olora", "corda", "lora_ga")  # read or change full-precision weights
INITS = (*PLAIN_INITS, *FULL_INITS, "loftq")
CHANGE_BASE = ("pissa", "olora", "corda", "lora_ga")  # subtract their start from the base weight
CONFIG_OF = {"eva": "eva_config", "corda": "corda_config", "lora_ga": "lora_ga_config"}


@register("adapter", "lora")
@dataclass
class Lora(PeftAdapter):
    """Low-rank adaptation (Hu et al., 2021, arXiv:2106.09685).

    A frozen linear ``W x`` becomes ``W x + (lora_alpha / r) B A x``; only A (r, in) and B (out, r) train. Variants are
    knobs: rsLoRA divides by sqrt(r) (arXiv:2312.03732); DoRA trains the norm of each output apart from its direction
    (arXiv:2402.09353); ``init_lora_weights`` names where A and B start: ``pissa`` (arXiv:2404.02948), ``olora``
    (arXiv:2406.01775), ``corda``, ``eva``, ``lora_ga``, ``loftq``, ``mica``, ``orthogonal``.

    Where a start changes the base weights, adapter/ is written as an ordinary LoRA of twice the rank for the original
    base; for ``loftq`` the changed base is written beside it, as base/.

    Options of peft that are missing here have no effect in such a run: ``fan_in_fan_out`` is found by peft,
    ``use_qalora`` needs GPTQ, ``megatron_*`` needs Megatron, ``arrow_config`` routes between finished adapters, and
    ``kasa_config`` and ``monteclora_config`` need loss terms that peft does not add.
    """

    r: int = 16  # rank
    lora_alpha: float = 32.0  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # dropout on the input of A
    target_modules: list[str] | str = (
        "all-linear"  # names, a regex, all-linear, or kinds: attention, mlp, q, k, v, o, up ...
    )
    exclude_modules: list[str] | str | None = None  # names or a regex of modules to leave alone
    bias: Literal["none", "all", "lora_only"] = "none"  # biases that train: none, all, or those of adapted linears
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r)
    use_dora: bool = False  # train magnitude and direction apart
    init_lora_weights: bool | str = (
        True  # start of A and B: true, gaussian, pissa, pissa_niter_N, olora, eva, corda, loftq ...
    )
    rank_pattern: dict[str, int] = field(default_factory=dict)  # other ranks by module name or regex
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # other alphas by module name or regex
    layers_to_transform: list[int] | int | None = None  # only these decoder layers, from 0
    layers_pattern: list[str] | str | None = None  # name of the list of layers, where peft cannot tell
    layer_replication: list[list[int]] | None = None  # stack layer ranges [[start, end), ...] that share base weights
    modules_to_save: list[str] | None = None  # other modules that train whole and are saved
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None  # token ids whose embeddings train
    target_parameters: list[str] | None = None  # parameters to adapt that are no linears, such as fused experts
    lora_bias: bool = False  # give B a bias
    ensure_weight_tying: bool = False  # adapt tied embedding and head together
    calibration_batches: int = 16  # training micro-batches that eva, corda and lora_ga look at
    eva_config: dict[str, Any] | None = None  # rho, tau, use_label_mask, whiten, adjust_scaling_factors
    corda_config: dict[str, Any] | None = None  # corda_method: ipm (new task first) or kpm (keep knowledge)
    lora_ga_config: dict[str, Any] | None = None  # direction, scale, stable_gamma
    loftq_iterations: int = 1  # rounds of quantising and fitting; above 1 the quantised base changes too
    velora_config: dict[str, Any] | None = None  # VeLoRA, compressed activations: num_groups, scale, init_type
    use_bdlora: dict[str, Any] | None = None  # block-diagonal A or B: target_modules_bd_a, target_modules_bd_b, nblocks
    alora_invocation_tokens: list[int] | None = None  # activated LoRA: adapt only from these tokens on

    @property
    def init(self) -> str:
        """Family of the start: ``pissa`` for pissa_niter_4."""
        return str(self.init_lora_weights).lower().split("_niter_")[0]

    def check(self, settings: Settings) -> None:
        if self.init not in INITS:
            raise ConfigError(
                f'there is no LoRA start "{self.init_lora_weights}"',
                "adapter.init_lora_weights",
                nearest(self.init, INITS),
            )
        quant = settings.choice("quant")
        if self.init == "loftq" and quant != "nf4":
            raise ConfigError(
                f"init_lora_weights=loftq makes up for the rounding of 4-bit weights; quant={quant} has none",
                f"adapter.init_lora_weights=loftq quant={quant}",
                "Use quant=nf4, or adapter.init_lora_weights=pissa.",
            )
        if self.init in FULL_INITS and quant != "none":
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights} works on full-precision base weights; quant={quant} rounds them",
                f"adapter.init_lora_weights={self.init_lora_weights} quant={quant}",
                "Use quant=none, or adapter.init_lora_weights=loftq with quant=nf4.",
            )
        if self.use_bdlora and quant != "none":
            raise ConfigError(
                "peft ignores use_bdlora on quantised weights", f"adapter.use_bdlora quant={quant}", "Use quant=none."
            )
        self._check_knobs()

    def _check_knobs(self) -> None:
        """Refuse what peft would ignore, and what can be told without it."""
        for init, knob in CONFIG_OF.items():
            if getattr(self, knob) is not None and self.init != init:
                raise ConfigError(
                    f"adapter.{knob} has no effect",
                    f"init_lora_weights={self.init_lora_weights}",
                    f"Add adapter.init_lora_weights={init}.",
                )
        if self.loftq_iterations != 1 and self.init != "loftq":
            raise ConfigError(
                "adapter.loftq_iterations has no effect",
                f"init_lora_weights={self.init_lora_weights}",
                "Add adapter.init_lora_weights=loftq.",
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("adapter.layers_pattern has no effect", todo="Add adapter.layers_to_transform=[...].")
        for knob in ("r", "loftq_iterations", "calibration_batches"):
            if getattr(self, knob) < 1:
                raise ConfigError(f"adapter.{knob} must be 1 or more", f"adapter.{knob}={getattr(self, knob)}")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                "adapter.lora_dropout is a share from 0 to 1", f"adapter.lora_dropout={self.lora_dropout}"
            )
        if self.init == "orthogonal" and self.r % 2:
            raise ConfigError(
                "init_lora_weights=orthogonal needs an even rank", f"adapter.r={self.r}", f"Use adapter.r={self.r + 1}."
            )
        if self.lora_bias and (self.use_dora or self.init not in ("true", "false")):
            raise ConfigError(
                "adapter.lora_bias goes with plain LoRA only", todo="Use use_dora=false and init_lora_weights=true."
            )
        named = ("use_dora", "use_bdlora", "velora_config", "alora_invocation_tokens")
        variants = [knob for knob in named if getattr(self, knob)] + ["init_lora_weights=mica"] * (self.init == "mica")
        if len(variants) > 1:
            raise ConfigError(
                f"these variants of LoRA exclude each other: {', '.join(variants)}", "adapter=lora", "Keep one."
            )

    def peft_config(self, ctx: Context) -> LoraConfig:
        from peft import EvaConfig, LoraConfig
        from peft.tuners.lora.config import BdLoraConfig, CordaConfig, LoraGAConfig, VeloraConfig

        targets: list[str] | str | None = self.target_modules
        if targets == "all-linear" and (self.layers_to_transform is not None or self.init in ("corda", "lora_ga")):
            targets = ["attention", "mlp"]  # peft does not take its own word for all linears here
        plain = ("true", "loftq")  # LoftQ's weights are filled in afterwards
        return LoraConfig(
            task_type=task_type(ctx),
            r=self.r,
            lora_alpha=whole(self.lora_alpha),  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            target_modules=resolve_targets(targets, ctx),
            exclude_modules=self.exclude_modules,
            bias=self.bias,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=True if self.init in plain else False if self.init == "false" else self.init_lora_weights,  # type: ignore[arg-type]
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern={name: whole(alpha) for name, alpha in self.alpha_pattern.items()},
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            layer_replication=[(start, end) for start, end in self.layer_replication]
            if self.layer_replication
            else None,
            modules_to_save=self.modules_to_save,
            trainable_token_indices=self.trainable_token_indices,
            target_parameters=self.target_parameters,
            lora_bias=self.lora_bias,
            ensure_weight_tying=self.ensure_weight_tying,
            eva_config=EvaConfig(**self.eva_config or {}) if self.init == "eva" else None,
            corda_config=CordaConfig(**self.corda_config or {}) if self.init == "corda" else None,
            lora_ga_config=LoraGAConfig(**self.lora_ga_config or {}) if self.init == "lora_ga" else None,
            velora_config=VeloraConfig(**self.velora_config) if self.velora_config is not None else None,
            use_bdlora=BdLoraConfig(**self.use_bdlora) if self.use_bdlora is not None else None,
            alora_invocation_tokens=self.alora_invocation_tokens,
        )

    def before_wrap(self, model: Any, config: PeftConfig, ctx: Context) -> None:
        if self.use_dora and getattr(model, "is_loaded_in_8bit", False) and model.device.type == "cpu":
            raise ConfigError(
                "DoRA on 8-bit weights fails on a CPU",
                "adapter.use_dora=true quant=int8",
                "Use quant=nf4, or adapter.use_dora=false.",
            )
        if self.init in ("corda", "lora_ga"):
            from ftrun.adapters.starts import calibration

            getattr(calibration, self.init)(model, config, ctx.calibration(self.calibration_batches))

    def after_wrap(self, model: Any, ctx: Context) -> None:
        if self.init == "eva":
            from ftrun.adapters.starts import calibration

            calibration.eva(model, model.peft_config["default"], ctx.calibration(self.calibration_batches))
        elif self.init == "loftq":
            from ftrun.adapters.starts import loftq

            loftq.initialise(model, self.loftq_iterations)
        self._start: dict[str, Tensor] | None = None
        if self.init in (*CHANGE_BASE, "loftq") or self.bias != "none":
            self._start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def disabled(self, model: Any) -> AbstractContextManager[None] | None:
        """The model before training; where switching LoRA off would not give it, by putting the start back."""
        start = getattr(self, "_start", None)
        if start is not None:
            return put_back(model, start)
        return None if self.bias != "none" else super().disabled(model)

    def save(self, model: Any, folder: Path) -> Path:
        if self.init == "loftq":
            from ftrun.adapters.starts import loftq

            loftq.save_base(model, folder / "base")
            config = model.peft_config["default"]
            config.base_model_name_or_path, config.revision = str((folder / "base").resolve()), None
        if self.init in CHANGE_BASE and self._start is not None:
            from ftrun.adapters.starts.lora_start import save_difference

            return save_difference(model, self._start, folder / "adapter")
        return super().save(model, folder)

    def load(self, model: Any, folder: Path) -> nn.Module:
        self._start = None
        if self.init == "loftq":
            model = load_again(model, folder / "base")
        return super().load(model, folder)

    def go_on(self, model: Any, ctx: Context, folder: Path) -> nn.Module:
        """adapter/ is an ordinary LoRA on the original base, whatever its own start was: this one begins there."""
        if self.init == "loftq":
            return Adapter.go_on(self, model, ctx, folder)  # its base was changed
        wrapped = super().go_on(model, ctx, folder)
        self.init_lora_weights, self._start = True, self._begun
        return wrapped

    def merge(self, model: Any) -> nn.Module:
        if self.layer_replication:
            raise ComponentError(
                "adapter.layer_replication cannot be merged: the copies of a layer share one base weight",
                todo="Load adapter/ with peft, which stacks the layers again.",
            )
        return super().merge(model)

    def state_dict(self) -> dict[str, Any]:
        """Where training started: the base's change can only be told from it."""
        return {"start": self._start} if self._start is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._start is None:
            return
        for name, saved in state["start"].items():
            if not saved.shape == self._start[name].shape or not saved.to(self._start[name]).allclose(
                self._start[name], atol=1e-5
            ):
                raise CheckpointError(
                    f"init_lora_weights={self.init_lora_weights} gives another start here than in the checkpoint",
                    name,
                    "Resume with the same data, seed, versions and kind of machine.",
                )


def whole(number: float) -> int | float:
    """16.0 as 16: other programs that read adapter_config.json expect an integer alpha."""
    return int(number) if float(number).is_integer() else number
