"""Finding recipes and reading them; a recipe can only name components and set their knobs."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

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
FIDELITIES = ("reference-checked", "from-paper", "reconstruction")


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

    def sets(self, key: str) -> bool:
        """Whether this file gives ``key``, spelt as on the command line, a value."""
        node: Any = self.values | self.blocks | {"paper": self.paper, "fidelity": self.fidelity}
        if key.startswith("select.picker"):
            node, key = {"picker": self.blocks.get("picker", {})}, key.removeprefix("select.")
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True


def folders() -> list[Path]:
    """Where recipes lie: the shipped ones, those of installed packages, and folders given with --recipes."""
    return [_shipped(), *_installed(), *map(Path, filter(None, os.environ.get("FTRUN_RECIPES", "").split(os.pathsep)))]


def _shipped() -> Path:
    """Inside the package when it was installed from a wheel, beside it in a checkout."""
    inside = registry.PACKAGE / "recipes"
    return inside if inside.is_dir() else registry.PACKAGE.parent / "recipes"


@functools.cache
def _installed() -> list[Path]:
    return [Path(entry.load()) for entry in importlib.metadata.entry_points(group="ftrun.recipes")]


def find(name: str) -> Recipe:
    """The recipe of a name or of a YAML file; an unknown name is a ConfigError that offers the nearest."""
    if name.endswith((".yaml", ".yml")):
        file = Path(name).expanduser()
        if not file.is_file():
            raise ConfigError(f"there is no recipe file {name}", f"recipe={name}", "Check the path.")
        return read(file)
    known = catalogue()
    if name not in known:
        close = nearest(name, known)
        # without a near one it would list them all
        todo = f"{close} See `ftrun recipes`." if close.startswith("Did you mean") else "`ftrun recipes` lists them."
        raise ConfigError(f'there is no recipe "{name}"', f"recipe={name}", todo)
    return read(known[name])


def catalogue() -> dict[str, Path]:
    """Name and file of every recipe; a later folder wins over an earlier one."""
    files: dict[str, Path] = {}
    for folder in folders():
        if not folder.is_dir():
            raise ConfigError(f"there is no recipe folder {folder}", todo="Check --recipes and FTRUN_RECIPES.")
        files |= {file.stem: file for file in folder.glob("*.yaml")}
    return dict(sorted(files.items()))


_BaseLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is twenty times faster


class YamlLoader(_BaseLoader):
    """Plain YAML values only, read as OmegaConf reads them: 1e-5 is a number, a date is text, no key comes twice."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for at, key in enumerate(keys) if key in keys[:at]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice} comes twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read(file: Path) -> Recipe:
    """Parse one recipe. Raises ConfigError for anything that is not a recipe, `_target_` and `hydra:` included."""
    try:
        text = file.read_text()
        raw: Any = yaml.load(text, Loader=YamlLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML", " ".join(str(error).split()), "Mend that line.") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read", str(error.strerror)) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} is not a recipe", f"it holds {type(raw).__name__}, not keys")
    _refuse_code(raw, file)
    choices = _choices(raw.pop("defaults", None) or [], file)
    blocks = {slot: _section(raw.pop(slot), slot, file) for slot in registry.SLOTS if slot in raw}
    if "picker" in blocks.get("select", {}):
        blocks["picker"] = _section(blocks["select"].pop("picker"), "picker", file)
    about, usage = _header(text)
    return Recipe(
        name=file.stem,
        file=file,
        paper=_section(raw.pop("paper", None), "paper", file),
        fidelity=str(raw.pop("fidelity", "")),
        differences=raw.pop("differences", None) or [],
        choices=choices,
        blocks=blocks,
        values={str(key): value for key, value in raw.items()},
        about=about,
        usage=usage,
    )


def _section(value: Any, key: str, file: Path) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        todo = f"Choose a component under defaults: `- override /{key}: {value}`." if key in registry.SLOTS else ""
        raise ConfigError(f"{file}: `{key}:` holds knobs, not {value!r}", f"{key}: {value}", todo)
    return value


def _choices(defaults: Any, file: Path) -> dict[str, Any]:
    """Turn ``- override /adapter: lora`` lines into {slot: name}."""
    choices: dict[str, Any] = {}
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        if entry == "_self_":
            continue
        if not isinstance(entry, dict) or len(entry) != 1 or not str(next(iter(entry))).startswith("override /"):
            raise ConfigError(f"{file}: a recipe's defaults are lines `- override /slot: name`, not {entry!r}")
        key, name = next(iter(entry.items()))
        slot = str(key).removeprefix("override /").replace("select/picker", "picker")
        if slot not in DEFAULT_CHOICES:
            raise ConfigError(f'{file}: there is no slot "{slot}"', f"{key}: {name}", nearest(slot, DEFAULT_CHOICES))
        names = name if isinstance(name, list) else [name]
        if slot in registry.COMBINED:
            name = registry.JOINT.join(map(str, names))
        for one in names if slot in registry.SLOTS else []:
            try:
                registry.find(slot, str(one))
            except ConfigError as error:
                raise ConfigError(f"{file}: {error.what}", f"{key}: {name}", error.todo) from None
        choices[slot] = name
    return choices


def _refuse_code(node: Any, file: Path, top: bool = True) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if str(key) in ("_target_", "_partial_", "_recursive_", "_convert_", "_args_") or (top and key == "hydra"):
                raise ConfigError(
                    f"{file} holds `{key}:`, which a recipe may not",
                    todo="A recipe names registered components; for code of your own, register a component (see the README).",
                )
            _refuse_code(value, file, top=False)
    elif isinstance(node, list):
        for value in node:
            _refuse_code(value, file, top=False)


def _header(text: str) -> tuple[str, list[str]]:
    """The comment at the top of a recipe: what it is good for, and the commands that run it."""
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
