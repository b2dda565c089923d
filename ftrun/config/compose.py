"""From a command line to checked Settings, by way of Hydra.

A recipe's values for a slot are stored apart, under the name of the component they belong to. The defaults list asks
for ``<recipe>--<choice>``, so that values meant for lora vanish by themselves when the command line says adapter=lisa,
inside a sweep too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftrun import registry
from ftrun.config import capabilities, recipes
from ftrun.config.recipes import DEFAULT_CHOICES, GROUPS, Recipe
from ftrun.config.schema import check_section, coerce
from ftrun.config.settings import SECTIONS, SETTINGS_FILE, SelectConfig, Settings
from ftrun.errors import ConfigError, nearest
from ftrun.registry import Knob

ROOT = "ftrun"
SINGLE_SLOTS = tuple(slot for slot in registry.SLOTS if slot != "eval")
SELECT_SHARED = {"model": {"path": None}, "batch_tokens": 4096, "unscored": "drop"}


@dataclass
class Composed:
    """Settings, and what a user should be told of how they came about."""

    settings: Settings
    recipe: Recipe | None
    notes: list[str] = field(default_factory=list)


# ---- the config store ----


def populate(chosen: Recipe | Sequence[Recipe] | None = None) -> None:
    """Put the root, every component and every group into Hydra's ConfigStore, and recipes as blocks."""
    store = ConfigStore.instance()
    for slot in registry.SLOTS:
        package = {"picker": "select.picker", "eval": "eval.{}"}.get(slot, slot)
        for spec in registry.specs(slot).values():
            node = {name: knob.default for name, knob in spec.knobs.items()}
            store.store(group=slot, name=spec.name, node=OmegaConf.create(node), package=package.format(spec.name))
    for group in GROUPS:
        for file in (registry.PACKAGE / "conf" / group).glob("*.yaml"):
            store.store(group=group, name=file.stem, node=OmegaConf.load(file), package=group)
    store.store(group="recipe", name="null", node=OmegaConf.create({}), package="_global_")
    for name in recipes.catalogue():
        store.store(group="recipe", name=name, node=OmegaConf.create({}), package="_global_")
    for recipe in [chosen] if isinstance(chosen, Recipe) else chosen or []:
        _store_recipe(store, recipe)
    store.store(name=ROOT, node=OmegaConf.create(_root_node()))


def _store_recipe(store: ConfigStore, recipe: Recipe) -> None:
    node = dict(recipe.values)
    node |= {"paper": recipe.paper, "fidelity": recipe.fidelity, "differences": recipe.differences}
    node["defaults"] = [{f"override /{slot}": name} for slot, name in recipe.choices.items()]
    if "eval" in recipe.blocks:
        node["eval"] = recipe.blocks["eval"]
    store.store(group="recipe", name=recipe.name, node=OmegaConf.create(node), package="_global_")
    for slot in SINGLE_SLOTS:
        if recipe.blocks.get(slot):
            store.store(
                group=f"_block/{slot}",
                name=f"{recipe.name}--{recipe.choice(slot)}",
                node=OmegaConf.create(recipe.blocks[slot]),
                package={"picker": "select.picker"}.get(slot, slot),
            )


def _root_node() -> dict[str, Any]:
    defaults: list[Any] = [{slot: name} for slot, name in DEFAULT_CHOICES.items() if slot not in GROUPS]
    defaults = ["_self_", *({group: DEFAULT_CHOICES[group]} for group in GROUPS), *defaults, {"recipe": "null"}]
    defaults += [{f"optional _block/{slot}": f"${{recipe}}--${{{slot}}}"} for slot in SINGLE_SLOTS]
    node: dict[str, Any] = {"defaults": defaults}
    for section in SECTIONS:
        node[section] = {name: knob.default for name, knob in section_knobs(section).items()}
    node |= {name: knob.default for name, knob in root_knobs().items() if name != "recipe"}
    node["select"] = dict(SELECT_SHARED)
    node["eval"] = {}
    # a run makes its own folder; Hydra only sweeps
    node["hydra"] = {
        "run": {"dir": "."},
        "sweep": {"dir": "runs/.sweeps/${now:%Y%m%d-%H%M%S}", "subdir": "${hydra.job.num}"},
        "output_subdir": None,
        "job": {"chdir": False},
    }
    return node


def section_knobs(section: str) -> dict[str, Knob]:
    return registry.read_dataclass(SETTINGS_FILE, SECTIONS[section].__name__)


def root_knobs() -> dict[str, Knob]:
    """Knobs at the top level of the config."""
    return registry.read_dataclass(SETTINGS_FILE, "RootConfig")


# ---- composing ----


def load(overrides: Sequence[str]) -> Composed:
    """Compose one config from command-line overrides (no sweep) and check all of it.

    Raises ConfigError with the offending key and the nearest valid one.
    """
    names = _recipe_names(overrides)
    populate([recipes.find(name) for name in names])
    overrides = [_with_recipe_stem(override) for override in overrides]
    GlobalHydra.instance().clear()
    try:
        with initialize(version_base=None, config_path=None):
            config = hydra_compose(ROOT, overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, overrides) from None
    choices = OmegaConf.to_container(config.hydra.runtime.choices)
    return resolve(config, choices, overrides)  # type: ignore[arg-type]


def check_all(overrides: Sequence[str], limit: int = 64) -> None:
    """Check every job of a sweep before the first one starts (the first ``limit`` of a larger one)."""
    columns: list[list[str]] = []
    for override in _parse(overrides):
        if override.is_sweep_override() and (override.is_choice_sweep() or override.is_range_sweep()):
            columns.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        elif not override.is_sweep_override():
            columns.append([str(override.input_line)])
    for count, job in enumerate(product(*columns)):
        if count == limit:
            break
        load([override for override in job if not override.startswith("hydra")])


def resolve(config: DictConfig, choices: dict[str, Any], overrides: Sequence[str]) -> Composed:
    """Turn a composed Hydra config into Settings, refusing every key that nothing would read."""
    raw: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    raw.pop("hydra", None)
    recipe_name = None if choices.get("recipe") in (None, "null") else str(choices["recipe"])
    recipe = _loaded(recipe_name) if recipe_name else None
    picker = raw["select"].pop("picker", {})
    shared = {"model": raw["select"].pop("model"), "batch_tokens": raw["select"].pop("batch_tokens"), "unscored": raw["select"].pop("unscored")}
    slots: dict[str, tuple[str, dict[str, Any]]] = {}
    specs = []
    for slot in SINGLE_SLOTS:
        values = picker if slot == "picker" else raw.pop(slot, {}) or {}
        spec = registry.find(slot, str(choices[slot]))
        prefix = "select.picker" if slot == "picker" else slot
        slots[slot] = (spec.name, check_section(values, spec.knobs, prefix, f"{slot}={spec.name}"))
        specs.append(spec)
    evaluators = _evaluators(raw.pop("eval", {}) or {}, choices["eval"], overrides)
    specs += [registry.find("eval", name) for name, _ in evaluators]
    sections = {
        section: cls(**check_section(raw.pop(section), section_knobs(section), section))
        for section, cls in SECTIONS.items()
    }
    scalars = check_section(raw, root_knobs(), "")
    scalars["recipe"] = recipe_name
    capabilities.check_mix(specs)
    settings = Settings(**scalars, **sections, slots=slots, eval=evaluators, select=_select_config(shared))
    _check_values(settings)
    return Composed(settings, recipe, _notes(recipe, settings))


def _select_config(shared: dict[str, Any]) -> SelectConfig:
    knobs = registry.read_dataclass(SETTINGS_FILE, "SelectConfig")
    model = shared.pop("model")
    values = check_section(model, {"path": Knob("path", knobs["model_path"].type, None)}, "select.model")
    checked = check_section(shared, {name: knob for name, knob in knobs.items() if name != "model_path"}, "select")
    return SelectConfig(model_path=values["path"], **checked)


def _evaluators(blocks: dict[str, Any], chosen: Any, overrides: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """The chosen evaluators in order. A recipe's values for one that was not chosen go; a user's are refused."""
    names = chosen if isinstance(chosen, list) else [name.strip() for name in str(chosen).strip("[]").split(",")]
    names = [name for name in names if name and name != "none"]
    for override in overrides:
        match = re.match(r"\+{0,2}eval\.([^.=]+)", override)
        if match and match[1] not in names:
            raise ConfigError(f'eval.{match[1]} is set, but that evaluator does not run', override, f"Add it: eval=[{','.join([*names, match[1]])}]")
    result = []
    for name in names:
        spec = registry.find("eval", name)
        result.append((name, check_section(blocks.get(name) or {}, spec.knobs, f"eval.{name}", f"eval={name}")))
    return result


def _check_values(settings: Settings) -> None:
    """Bounds that a type cannot say."""
    positive = {
        "train.batch_size": settings.train.batch_size,
        "train.batch_tokens": settings.train.batch_tokens,
        "train.epochs": settings.train.epochs,
        "train.log_steps": settings.train.log_steps,
        "data.max_length": settings.data.max_length,
        "launch.processes": settings.launch.processes,
        "launch.nodes": settings.launch.nodes,
        "train.save_steps": settings.train.save_steps,
        "train.eval_steps": settings.train.eval_steps,
        "train.max_steps": settings.train.max_steps,
        "train.keep_checkpoints": settings.train.keep_checkpoints,
    }
    for key, value in positive.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{key} must be above 0, not {value}", f"{key}={value}")
    if not 0 <= settings.data.heldout < 1:
        raise ConfigError(f"data.heldout is a share of the rows, from 0 to below 1, not {settings.data.heldout}")
    if settings.train.load_best and not (settings.train.save_steps and settings.train.eval_steps):
        raise ConfigError("train.load_best needs train.save_steps and train.eval_steps", "train.load_best=true", "Set both, to the same number.")
    if settings.fidelity and settings.fidelity not in ("reference-checked", "from-paper", "reconstruction"):
        raise ConfigError(f'fidelity is "{settings.fidelity}"', "fidelity:", "Use reference-checked, from-paper or reconstruction.")
    parse_budget(settings.budget)


def parse_budget(budget: int | float | str | None) -> tuple[str, float] | None:
    """A budget as ("share", 0.05), ("rows", 500) or ("tokens", 1e6).

    Raises ConfigError for anything else.
    """
    if budget is None:
        return None
    if isinstance(budget, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB]?)_?tokens?", budget.strip())
        if match:
            return "tokens", float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()]
    elif isinstance(budget, float) and 0 < budget < 1:
        return "share", budget
    elif budget == 1.0 and isinstance(budget, float):
        return "share", 1.0
    elif budget >= 1 and budget == int(budget):
        return "rows", float(budget)
    raise ConfigError(f"budget {budget!r} is not a budget", f"budget={budget}", "Use a share (0.05), a number of rows (500), or tokens (1M_tokens).")


def _notes(recipe: Recipe | None, settings: Settings) -> list[str]:
    notes = []
    for slot in SINGLE_SLOTS:
        if recipe and recipe.blocks.get(slot) and settings.choice(slot) != recipe.choice(slot):
            dropped = ", ".join(f"{key}={value}" for key, value in recipe.blocks[slot].items())
            notes.append(f"{slot}={settings.choice(slot)} replaces {recipe.choice(slot)}; the recipe's {dropped} went with it")
    return notes


# ---- recipes named on the command line ----

_recipe_files: dict[str, str] = {}  # stem -> file, for recipes given as files


def _recipe_names(overrides: Sequence[str]) -> list[str]:
    names: list[str] = []
    for override in overrides:
        if override.startswith("recipe="):
            names += [name for name in override.removeprefix("recipe=").strip("'\"").split(",") if name and name != "null"]
    return names


def _with_recipe_stem(override: str) -> str:
    """``recipe=./mine.yaml`` as ``recipe=mine``, which is how the store knows it."""
    if not override.startswith("recipe="):
        return override
    stems = []
    for name in override.removeprefix("recipe=").strip("'\"").split(","):
        stem = recipes.find(name).name if name != "null" else name
        if name.endswith((".yaml", ".yml")):
            _recipe_files[stem] = name
        stems.append(stem)
    return "recipe=" + ",".join(stems)


def _loaded(name: str) -> Recipe:
    return recipes.find(_recipe_files.get(name, name))


# ---- errors ----


def _parse(overrides: Sequence[str]) -> list[Any]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError("an override is not of the form key=value", " ".join(str(error).split()), "Quote values with special characters: 'key=\"a, b\"'.") from None


def _explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """One clear line for what Hydra refused: an unknown key, choice or malformed override."""
    for override in _parse(overrides):
        key, value = override.key_or_group, override.value()
        if key in DEFAULT_CHOICES and not override.is_delete():
            for one in value if isinstance(value, list) else [value]:
                _check_choice(key, one)
        elif "." not in key and key not in root_knobs() and not key.startswith("hydra"):
            known = [*root_knobs(), *DEFAULT_CHOICES, "train", "launch"]
            return ConfigError(f'there is no key "{key}"', str(override.input_line), nearest(key, known))
    plain = [override for override in _parse(overrides) if override.key_or_group in (*DEFAULT_CHOICES, "recipe")]
    for override in _parse(overrides):
        if "." in override.key_or_group and not override.key_or_group.startswith("hydra"):
            _check_path(override, [str(one.input_line) for one in plain])
    return ConfigError("the config cannot be composed", " ".join(str(error).split()))


def _check_choice(slot: str, name: Any) -> None:
    if slot in registry.SLOTS:
        registry.find(slot, str(name))
        return
    known = [file.stem for file in (registry.PACKAGE / "conf" / slot).glob("*.yaml")]
    if str(name) not in known:
        raise ConfigError(f'{slot} has no choice "{name}"', f"{slot}={name}", nearest(str(name), known) + f" For one of your own: {slot}.path=...")


def _check_path(override: Any, choices: list[str]) -> None:
    """Refuse a dotted key that the chosen components do not have."""
    GlobalHydra.instance().clear()
    with initialize(version_base=None, config_path=None):
        node: Any = OmegaConf.to_container(hydra_compose(ROOT, overrides=choices), resolve=False)
    parts = override.key_or_group.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, dict) or part not in node:
            where = ".".join(parts[:depth])
            owner = next((c for c in choices if c.startswith(f"{where}=")), "")
            known = list(node) if isinstance(node, dict) else []
            everywhere = [f"{where}.{name}" if where else name for name in known]
            whose = f" of {owner}" if owner else ""
            raise ConfigError(f'there is no key "{override.key_or_group}"{whose}', str(override.input_line), nearest(".".join(parts[: depth + 1]), everywhere))
        node = node[part]
