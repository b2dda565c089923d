"""The settings of a finished run, read back from its folder."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ftrun import registry
from ftrun.config.schema import check_section
from ftrun.config.settings import SECTIONS, SETTINGS_FILE, SelectConfig, Settings, TokensConfig
from ftrun.errors import ConfigError


def load_settings(run: str | Path | None) -> tuple[Path, Settings]:
    """Folder and settings of a run. Raises ConfigError when there is no run in that folder."""
    if not run:
        raise ConfigError("which run?", todo="Give its folder: run=runs/...")
    folder = Path(run)
    file = folder / "config.yaml"
    if not file.exists():
        raise ConfigError(
            f"there is no run in {folder}", f"run={folder}", "Give the folder of a run: the one that holds config.yaml."
        )
    plain: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(file))  # type: ignore[assignment]
    names = str(plain.get("recipe")).split(",")
    if len(names) > 1:
        raise ConfigError(
            f"{folder} holds what {' and '.join(names)} selected, and no trained model",
            f"run={folder}",
            f"Train with one of them, ftrun train recipe={names[0]}, and give the folder of that run.",
        )
    return folder, settings_from(plain)


def settings_from(plain: dict[str, Any]) -> Settings:
    """The inverse of ``Settings.as_dict``."""
    plain = dict(plain)
    select = dict(plain.pop("select"))
    picker = dict(select.pop("picker"))
    shared = {"model_path": select.pop("model")["path"]}
    shared |= {knob.name: select.pop(knob.name) for knob in fields(SelectConfig) if knob.name in select}
    values = {"select": select, "picker": picker} | {
        slot: dict(plain.pop(slot)) for slot in registry.SLOTS if slot in plain and slot != "eval"
    }
    tokens = TokensConfig(values["tokens"].pop("from", None))
    slots = {}
    for slot, knobs in values.items():
        spec = registry.find(slot, knobs.pop("name"))
        slots[slot] = (spec.name, check_section(knobs, spec.knobs, slot, f"{slot}={spec.name}"))
    evaluators = [
        (name, check_section(knobs, registry.find("eval", name).knobs, f"eval.{name}"))
        for name, knobs in plain.pop("eval").items()
    ]
    sections = {
        name: cls(**check_section(plain.pop(name), registry.read_dataclass(SETTINGS_FILE, cls.__name__), name))
        for name, cls in SECTIONS.items()
    }
    scalars = check_section(plain, registry.read_dataclass(SETTINGS_FILE, "RootConfig"), "")
    return Settings(**scalars, **sections, slots=slots, eval=evaluators, select=SelectConfig(**shared), tokens=tokens)
