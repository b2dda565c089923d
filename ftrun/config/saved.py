"""The settings of a finished run, read back from its folder."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ftrun import registry
from ftrun.config.recipes import Recipe
from ftrun.config.schema import check_section
from ftrun.config.settings import (
    SECTIONS,
    SETTINGS_FILE,
    SelectConfig,
    Settings,
    TokensConfig,
    section_knobs,
    section_of,
)
from ftrun.errors import ConfigError

CONFIG = "config.yaml"
AS_RECIPE = "_run"  # name under which the config of a run is composed like a recipe
NOT_INHERITED = ("recipe", "out", "resume", "prompt")  # what a run said of itself alone


def load_settings(run: str | Path | None) -> tuple[Path, Settings]:
    """Folder and settings of a run. Raises ConfigError when there is no run in that folder."""
    folder = run_folder(run)
    return folder, settings_from(_single(folder, "run"))


def run_folder(run: str | Path | None, key: str = "run") -> Path:
    """The folder of the run that ``key=run`` names. Raises ConfigError when there is none."""
    if not run:
        raise ConfigError("which run?", todo=f"Give its folder: {key}=runs/...")
    folder = Path(run).expanduser()
    if not (folder / CONFIG).exists():
        raise ConfigError(
            f"there is no run in {folder}",
            f"{key}={folder}",
            "Give the folder of a run: the one that holds config.yaml.",
        )
    return folder


def recipes_of(run: str | Path) -> list[str]:
    """The recipes of a run, several where it selected by several; empty when there is no run, or no recipe."""
    file = Path(run).expanduser() / CONFIG
    name = _plain(file).get("recipe") if file.exists() else None
    return str(name).split(",") if name else []


def as_recipe(folder: Path, key: str, without: Collection[str] = ()) -> tuple[Recipe, str | None]:
    """The config of a run as a recipe, so that a command line can change single keys of it; and its recipe's name.

    ``key`` is what named the folder; sections of ``without`` are left to their defaults. A text that looks like an
    interpolation stays what it is. Raises ConfigError when there is no run, or one of several recipes.
    """
    plain = _literal(_single(run_folder(folder, key), key))
    name = plain.get("recipe")
    select = plain.pop("select")
    plain["picker"] = select.pop("picker")
    blocks = {slot: plain.pop(slot) for slot in registry.SLOTS if slot not in ("select", "eval")} | {"select": select}
    choices: dict[str, Any] = {slot: block.pop("name") for slot, block in blocks.items()}
    choices["eval"] = list(plain["eval"])
    blocks["eval"] = plain.pop("eval")
    for word in without:
        choices.pop(word, None)
        blocks.pop(word, None)
    about = {word: plain.pop(word) for word in ("paper", "fidelity", "differences")}
    values = {word: value for word, value in plain.items() if word not in (*NOT_INHERITED, *without)}
    return Recipe(AS_RECIPE, folder / CONFIG, **about, choices=choices, blocks=blocks, values=values), name


def _single(folder: Path, key: str) -> dict[str, Any]:
    """The config of a run of one recipe."""
    plain = _plain(folder / CONFIG)
    names = str(plain.get("recipe")).split(",")
    if len(names) > 1:
        raise ConfigError(
            f"{folder} holds what {' and '.join(names)} selected, and no trained model",
            f"{key}={folder}",
            f"Train with one of them, ftrun train recipe={names[0]}, and give the folder of that run.",
        )
    return plain


def _plain(file: Path) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(file))  # type: ignore[return-value]


def _literal(value: Any) -> Any:
    """The same value with every text protected from interpolation."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value) if isinstance(value, str) else value


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
    sections = {name: section_of(name, check_section(plain.pop(name), section_knobs(name), name)) for name in SECTIONS}
    scalars = check_section(plain, registry.read_dataclass(SETTINGS_FILE, "RootConfig"), "")
    return Settings(**scalars, **sections, slots=slots, eval=evaluators, select=SelectConfig(**shared), tokens=tokens)
