"""Which components cannot work together, found before any weight is loaded.

A component says in its own file what it needs and what it takes away, in words that complete a sentence:

    class Lisa(Adapter):
        needs = {"trainable_base": "trains layers of the base weights"}
    class Nf4(Quant):
        lacks = {"trainable_base": "freezes them in 4 bits"}

gives "adapter=lisa trains layers of the base weights; quant=nf4 freezes them in 4 bits. Use quant=none, or adapter=lora."
"""

from __future__ import annotations

from collections.abc import Sequence

from ftrun import registry
from ftrun.config.settings import LaunchConfig
from ftrun.errors import ConfigError
from ftrun.registry import Spec

# which components a stage puts to work; the quantisation is there whenever a model is loaded
AT_WORK = {
    "select": ("select", "picker"),
    "train": ("tokens", "adapter", "objective", "optim", "schedule"),
    "eval": ("eval",),
}
STAGES_OF = {"select": ("select",), "eval": ("eval",), "generate": (), "merge": ()}  # verbs that have their own


def slots_at_work(verb: str, stages: Sequence[str]) -> set[str]:
    """The slots whose components ``verb`` runs, where the config names these stages."""
    return {"quant", *(slot for stage in STAGES_OF.get(verb, stages) for slot in AT_WORK[stage])}


def check_mix(chosen: list[Spec]) -> None:
    """Refuse a mix in which one component needs what another takes away."""
    for needy in chosen:
        for capability, reason in needy.needs.items():
            for taker in chosen:
                if capability in taker.lacks:
                    raise ConfigError(
                        f"{needy.slot}={needy.name} {reason}; {taker.slot}={taker.name} {taker.lacks[capability]}",
                        f"{needy.slot}={needy.name} {taker.slot}={taker.name}",
                        _way_out(needy, taker, capability),
                    )


def check_strategy(chosen: list[Spec], launch: LaunchConfig) -> None:
    """Refuse what cannot be shared between processes in the way that ``launch`` names."""
    if launch.context_parallel > 1:
        raise ConfigError(
            "processes cannot share a row yet: torch's attention over several processes has no form for CPUs, and its "
            "form for GPUs was never proven here",
            f"launch.context_parallel={launch.context_parallel}",
            "For long rows use launch.strategy=fsdp, train.gradient_checkpointing=true, or a shorter data.max_length.",
        )
    if launch.strategy != "fsdp":
        return
    for spec in chosen:
        if "whole_weights" in spec.needs:
            raise ConfigError(
                f"{spec.slot}={spec.name} {spec.needs['whole_weights']}; launch.strategy=fsdp gives each process a slice of every weight",
                f"{spec.slot}={spec.name} launch.strategy=fsdp",
                f"Use launch.strategy=ddp, or another {spec.slot}.",
            )


def _way_out(needy: Spec, taker: Spec, capability: str) -> str:
    ways = []
    for culprit, blocked in (
        (taker, lambda spec: capability in spec.lacks),
        (needy, lambda spec: capability in spec.needs),
    ):
        others = [spec.name for spec in registry.specs(culprit.slot).values() if not blocked(spec)]
        if others:
            # the plainest choice is the best advice: none, then the slot's best-known component
            best = next((name for name in ("none", "lora", "sft", "adamw") if name in others), others[0])
            ways.append(f"{culprit.slot}={best}")
    return "Use " + ", or ".join(ways) + "." if ways else ""
