"""Finding recipes and reading them; a recipe can only name components and set their knobs."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftrun import registry
from ftrun.config import plain_yaml, settings
from ftrun.config.place import place
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
# what a command says of itself: no file that somebody else wrote decides it
OF_A_COMMAND = {"hydra", "recipe", "run", "resume", "out", "prompt"}
REGISTER = "A recipe names registered components; for code of your own, register a component (see the README)."
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
        file = place(name, "recipe")
        if not file.is_file():
            raise ConfigError(f"there is no recipe file {name}", f"recipe={name}", "Check the path.")
        if file.stem in ("null", "_run"):
            raise ConfigError(f"a recipe cannot be called {file.stem}", f"recipe={name}", "Rename the file.")
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


def read(file: Path) -> Recipe:
    """Parse one recipe. Raises ConfigError for anything that is not a recipe, `_target_` and `hydra:` included."""
    text = plain_yaml.read_text(file)
    raw: Any = plain_yaml.parse(text, file) or {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} is not a recipe", f"it holds {type(raw).__name__}, not keys")
    _refuse_reach(raw, file)
    choices = _choices(raw.pop("defaults", None) or [], file)
    blocks = {slot: _section(raw.pop(slot), slot, file) for slot in registry.SLOTS if slot in raw}
    if "picker" in blocks.get("select", {}):
        blocks["picker"] = _section(blocks["select"].pop("picker"), "picker", file)
    about, usage = _header(text)
    made = Recipe(
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
    _check_shapes(made)
    return made


def _check_shapes(recipe: Recipe) -> None:
    """Refuse a table or list where the config has none, which Hydra cannot merge, and evaluators that there are not."""
    _check_shape(recipe.values, settings.root_knobs(), "", recipe.file)
    _check_shape({"differences": recipe.differences}, settings.root_knobs(), "", recipe.file)
    for section in settings.SECTIONS:
        values = _section(recipe.values.get(section), section, recipe.file)
        _check_shape(values, settings.section_knobs(section), f"{section}.", recipe.file)
    for slot, block in recipe.blocks.items():
        names = str(recipe.choice(slot)).split(registry.JOINT)
        if slot == "eval":
            for name, values in block.items():
                spec = registry.find(slot, str(name))
                values = _section(values, f"eval.{name}", recipe.file)
                _check_shape(values, spec.knobs, f"eval.{name}.", recipe.file)
        elif len(names) == 1:
            _check_shape(block, registry.find(slot, names[0]).knobs, f"{slot}.", recipe.file)


def _check_shape(values: dict[str, Any], knobs: Mapping[str, registry.Knob], prefix: str, file: Path) -> None:
    for key, value in values.items():
        knob = knobs.get(key)
        tables = isinstance(value, dict), isinstance(knob.default if knob else value, dict)
        if knob and value is not None and tables[0] != tables[1]:
            what = f"{file}: `{prefix}{key}:` takes {registry.type_name(knob.type)}, not {value!r:.80}"
            raise ConfigError(what, str(file), f"See `ftrun show` for the meaning of {prefix}{key}.")


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
        if slot in choices or (isinstance(name, list) and slot != "eval" and slot not in registry.COMBINED):
            raise ConfigError(f"{file}: {slot} takes one name, on one line", f"{key}: {name}")
        if slot in GROUPS and not (registry.PACKAGE / "conf" / slot / f"{name}.yaml").is_file():
            there = [found.stem for found in (registry.PACKAGE / "conf" / slot).glob("*.yaml")]
            todo = f"{nearest(str(name), there)} For one of your own: `{slot}: {{path: ...}}`."
            raise ConfigError(f'{file}: {slot} has no choice "{name}"', f"{key}: {name}", todo)
        if slot in registry.COMBINED:
            name = registry.JOINT.join(map(str, names))
        for one in names if slot in registry.SLOTS else []:
            try:
                registry.find(slot, str(one))
            except ConfigError as error:
                raise ConfigError(f"{file}: {error.what}", f"{key}: {name}", error.todo) from None
        choices[slot] = name
    return choices


def _refuse_reach(raw: dict[str, Any], file: Path) -> None:
    """Refuse what only a command may say: where a run lies, whose code is trusted, what the environment holds."""
    for key in sorted(OF_A_COMMAND & raw.keys()):
        todo = f"Say it on the command line: {key}=..." if key != "hydra" else REGISTER
        raise ConfigError(f"{file} holds `{key}:`, which a recipe may not", str(file), todo)
    if _below(raw, "model", "trust_remote_code"):
        what = f"{file} holds `model.trust_remote_code:`, which a recipe may not"
        raise ConfigError(what, str(file), "Read the model's code; if you trust it, say so on the command line.")
    tasks = _below(raw, "eval", "lm_eval", "tasks")
    named = [str(task) for task in tasks] if isinstance(tasks, list) else [str(tasks or "")]
    if _below(raw, "eval", "lm_eval", "include_path") or any(re.search(r"[/\\]|\.ya?ml$", name) for name in named):
        what = f"{file} names files with tasks of lm-eval, which can hold code: a recipe may not"
        raise ConfigError(what, str(file), "Say it on the command line: eval.lm_eval.include_path=...")
    _refuse_values(raw, file)


def _below(node: Any, *path: str) -> Any:
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _refuse_values(node: Any, file: Path) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if str(key).startswith("_"):
                raise ConfigError(f"{file} holds `{key!s:.50}:`, which a recipe may not", str(file), REGISTER)
            _refuse_values(value, file)
    elif isinstance(node, list):
        for value in node:
            _refuse_values(value, file)
    elif node == "???":
        raise ConfigError(f"{file} leaves a value open with ???", str(file), "Give it a value, or leave the key out.")
    elif isinstance(node, str) and "${" in node:
        _refuse_reading(node, file)


def _refuse_reading(text: str, file: Path) -> None:
    """Refuse a ``${...}`` that is not the name of a key: ``${oc.env:...}`` would carry a secret into the run's record."""
    from omegaconf.errors import OmegaConfBaseException
    from omegaconf.grammar_parser import OmegaConfGrammarParser, parse  # type: ignore[attr-defined]

    todo = "It takes the name of a key, as in ${seed}; text is written \\${...}."
    try:
        waiting: list[Any] = [parse(text)]
    except (OmegaConfBaseException, RecursionError):
        raise ConfigError(f"{file} holds a ${{...}} that cannot be read: {text!r:.80}", str(file), todo) from None
    while waiting:
        node = waiting.pop()
        if isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext):
            raise ConfigError(f"{file} holds {text!r:.80}, and a recipe may only name keys", str(file), todo)
        waiting += getattr(node, "children", None) or []


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
