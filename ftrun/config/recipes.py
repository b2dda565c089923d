"""Finding recipes and reading them; a recipe can only name components and set their knobs."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftrun import registry
from ftrun.errors import ConfigError, nearest

GROUPS = ("model", "data")  # Hydra groups that are not slots
# the plainest chain: full fine-tuning of all rows
DEFAULT_CHOICES: dict[str, Any] = {
    "select": "none",
    "picker": "own",
    "tokens": "none",
    "adapter": "none",
    "quant": "none",
    "objective": "sft",
    "optim": "adamw",
    "schedule": "cosine",
    "eval": ["heldout"],
    "model": "smollm2_135m",
    "data": "gsm_symbolic",
}


@dataclass(frozen=True)
class Recipe:
    """One YAML file, split the way it is composed: choices, blocks of values a slot, and everything else."""

    name: str
    file: Path
    paper: dict[str, Any]
    fidelity: str
    differences: list[str]
    choices: dict[str, Any]  # slot or group -> component name(s) that `override /slot: name` picks
    blocks: dict[str, dict[str, Any]]  # slot -> knob values that belong to this recipe's choice
    values: dict[str, Any] = field(default_factory=dict)  # train, data, budget ...
    about: str = ""  # the comment at the top of the file
    usage: list[str] = field(default_factory=list)  # the commands in that comment

    def choice(self, slot: str) -> Any:
        return self.choices.get(slot, DEFAULT_CHOICES[slot])


def folders() -> list[Path]:
    """Where recipes lie: the shipped ones, those of installed packages, and folders given with --recipes."""
    checkout = registry.PACKAGE.parent / "recipes"
    found = [checkout if checkout.is_dir() else registry.PACKAGE / "recipes"]
    for entry in importlib.metadata.entry_points(group="ftrun.recipes"):
        found.append(Path(entry.load()))
    found += [Path(folder) for folder in os.environ.get("FTRUN_RECIPES", "").split(os.pathsep) if folder]
    return found


def find(name: str) -> Recipe:
    """The recipe of a name or of a YAML file; an unknown name is a ConfigError that offers the nearest."""
    if name.endswith((".yaml", ".yml")):
        file = Path(name)
        if not file.is_file():
            raise ConfigError(f"there is no recipe file {name}", todo="Check the path.")
        return read(file)
    known = catalogue()
    if name not in known:
        raise ConfigError(f'there is no recipe "{name}"', f"recipe={name}", nearest(name, known) + " See `ftrun recipes`.")
    return read(known[name])


@functools.cache
def catalogue() -> dict[str, Path]:
    """Name and file of every recipe; a later folder wins over an earlier one."""
    files: dict[str, Path] = {}
    for folder in folders():
        if not folder.is_dir():
            raise ConfigError(f"there is no recipe folder {folder}", todo="Check --recipes and FTRUN_RECIPES.")
        files |= {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return dict(sorted(files.items()))


@functools.cache
def read(file: Path) -> Recipe:
    """Parse one recipe. Raises ConfigError for anything that is not a recipe, `_target_` and `hydra:` included."""
    text = file.read_text()
    try:
        raw = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (OmegaConfBaseException, ValueError, Exception) as error:  # yaml raises its own hierarchy
        if not isinstance(error, Exception) or error.__class__.__module__.split(".")[0] not in ("yaml", "omegaconf", "builtins"):
            raise
        raise ConfigError(f"{file} is not valid YAML", " ".join(str(error).split()), "Mend the line.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} is not a recipe: it holds no keys")
    _refuse_code(raw, file)
    choices = _choices(raw.pop("defaults", []), file)
    blocks = {slot: raw.pop(slot) or {} for slot in registry.SLOTS if slot in raw}
    if "picker" in blocks.get("select", {}):
        blocks["picker"] = blocks["select"].pop("picker")
    about, usage = _header(text)
    return Recipe(
        name=file.stem,
        file=file,
        paper=raw.pop("paper", {}),
        fidelity=raw.pop("fidelity", ""),
        differences=raw.pop("differences", []) or [],
        choices=choices,
        blocks=blocks,
        values=raw,  # type: ignore[arg-type]
        about=about,
        usage=usage,
    )


def _choices(defaults: Any, file: Path) -> dict[str, Any]:
    """Turn ``- override /adapter: lora`` lines into {slot: name}."""
    choices: dict[str, Any] = {}
    for entry in defaults or []:
        if entry == "_self_":
            continue
        if not isinstance(entry, dict) or len(entry) != 1 or not str(next(iter(entry))).startswith("override /"):
            raise ConfigError(f"{file}: a recipe's defaults are lines `override /slot: name`, not {entry!r}")
        key, name = next(iter(entry.items()))
        slot = str(key).removeprefix("override /").replace("select/picker", "picker")
        if slot not in DEFAULT_CHOICES:
            raise ConfigError(f'{file}: there is no slot "{slot}"', f"{key}: {name}", nearest(slot, DEFAULT_CHOICES))
        if slot in registry.SLOTS:
            for one in name if isinstance(name, list) else [name]:
                registry.find(slot, one)
        choices[slot] = name
    return choices


def _refuse_code(node: Any, file: Path, top: bool = True) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("_target_", "_partial_", "_recursive_") or (top and key == "hydra"):
                raise ConfigError(
                    f"{file} holds `{key}:`, which a recipe may not",
                    todo="A recipe names registered components; to run code of your own, register a component (see the README).",
                )
            _refuse_code(value, file, top=False)
    elif isinstance(node, list):
        for value in node:
            _refuse_code(value, file, top=False)


def _header(text: str) -> tuple[str, list[str]]:
    about: list[str] = []
    usage: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        content = line.lstrip("#").strip()
        if content.startswith("ftrun "):
            usage.append(content)
        elif content and not usage:
            about.append(content)
    return " ".join(about), usage
