"""From a command line to checked Settings, by way of Hydra."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftrun import registry
from ftrun.config import capabilities, keys, recipes
from ftrun.config.explain import explain, parse, slot_taken_away, suggest, unresolved
from ftrun.config.grammar import quote
from ftrun.config.recipes import DEFAULT_CHOICES, GROUPS, Recipe
from ftrun.config.saved import as_recipe, recipes_of, run_folder
from ftrun.config.schema import check_section
from ftrun.config.settings import (
    SECTIONS,
    SelectConfig,
    Settings,
    TokensConfig,
    root_knobs,
    section_knobs,
    section_of,
    shared_select_knobs,
    shared_tokens_knobs,
)
from ftrun.config.store import CHOSEN, RECIPE_FILE, ROOT, SINGLE_SLOTS, populate
from ftrun.config.values import check_values
from ftrun.errors import ConfigError
from ftrun.registry import Spec

POOL_KEYS = ("path", "format", "columns", "weights", "split", "limit", "system")  # of data: which rows there are


@dataclass
class Composed:
    """Settings, and what a user should be told of how they came about."""

    settings: Settings
    recipe: Recipe | None
    notes: list[str] = field(default_factory=list)


def prepare(overrides: Sequence[str], base: Recipe | None = None) -> list[str]:
    """Fill Hydra's store for these overrides, and return them as Hydra must see them.

    ``recipe=./mine.yaml`` becomes ``recipe=mine``. ``base``: what the overrides change, where they name no recipe.
    Raises ConfigError for a recipe that cannot be found or read.
    """
    chosen: list[Recipe] = [base] if base else []
    seen: list[str] = [f"recipe={base.name}"] if base else []
    for override in overrides:
        if override.startswith("recipe="):
            names = [name.strip() for name in override.removeprefix("recipe=").strip("'\"").split(",")]
            found = [recipes.find(name) for name in names if name not in ("", "null")]
            chosen += found
            override = "recipe=" + (",".join(_readable(recipe.name) for recipe in found) or "null")
        seen.append(_joined(override))
    populate(chosen, _combined(seen))
    return seen


def _readable(name: str) -> str:
    """The name of a recipe as Hydra reads it: a file may be called 1e5.yaml."""
    return (
        name if re.fullmatch(r"(?!(null|true|false|inf|nan)$)[A-Za-z_][\w-]*", name, re.ASCII | re.I) else quote(name)
    )


def _joined(override: str) -> str:
    """``tokens=[a,b]`` as ``tokens=a+b``, the name of the two together; in a sweep too."""
    slot, _, value = override.partition("=")
    if slot not in registry.COMBINED:
        return override
    return f"{slot}=" + re.sub(r"\[([^\[\]]*)\]", lambda several: _one_name(several[1]), value)


def _one_name(names: str) -> str:
    return registry.JOINT.join(name.strip() for name in names.split(",") if name.strip()) or "none"


def _combined(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Choices of several components that these overrides name, as (slot, names joined by +)."""
    found = []
    for slot, _, value in (override.partition("=") for override in overrides):
        names = [name.strip("'\" ") for name in value.split(",")] if slot in registry.COMBINED else []
        found += [(slot, name) for name in names if registry.JOINT in name]
    return found


def load(overrides: Sequence[str], verb: str | None = None, saved_in: Path | None = None) -> Composed:
    """Compose one config from command-line overrides (no sweep) and check all of it, for what ``verb`` does.

    With ``verb``, keys that it does not read are refused, and those of a run that it works on are the defaults.
    ``saved_in``: the folder whose config.yaml gives the defaults instead. Raises ConfigError with the offending key and
    the nearest valid one.
    """
    if verb:
        keys.check_read(verb, overrides)
    base, name = as_recipe(saved_in, "resume") if saved_in else base_of(verb, overrides)
    words = prepare(overrides, base)
    parse(words)
    around = GlobalHydra.instance().hydra  # of a sweep that this is a job of
    GlobalHydra.instance().clear()
    try:
        with initialize(version_base=None, config_path=None):
            config = hydra_compose(ROOT, overrides=words, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError, TypeError, AttributeError) as error:
        raise explain(error, words) from error
    finally:
        GlobalHydra.instance().hydra = around
    choices: Any = OmegaConf.to_container(config.hydra.runtime.choices)
    composed = resolve(config, choices, words, base, verb or "train")
    if base:
        composed.settings.recipe = name
    return composed


def base_of(verb: str | None, overrides: Sequence[str]) -> tuple[Recipe | None, str | None]:
    """The run whose settings are the defaults of this command, as a recipe, and the name of its recipe.

    That of ``run=`` or ``resume=``, where the command line names no recipe. Raises ConfigError when there is no such run.
    """
    given = {one.key_or_group: one for one in keys.read(overrides) if not one.is_sweep_override()}
    key = "resume" if verb in ("train", "select") and "resume" in given else "run"
    takes = key == "resume" or verb in (*keys.ON_RUN, "train", "plan", "preview")
    folder = given[key].value() if takes and key in given else None
    if not folder or "recipe" in given:
        return None, None
    fresh = {group for group in GROUPS if group in given}  # chosen anew: the run's values for it go
    # which machine, which stages and which start are the matter of a command, not of the run that it works on
    fresh |= set() if key == "resume" else {"launch", "run", "stages"}
    return as_recipe(Path(str(folder)), key, fresh)


def recipe_names(overrides: Sequence[str]) -> list[str]:
    """The recipes of ``recipe=a,b,c``, or of the run in ``resume=``; empty when there are none."""
    said = [word.removeprefix("recipe=").strip("'\"") for word in overrides if word.startswith("recipe=")]
    if said:
        return [name.strip() for name in said[-1].split(",") if name.strip()]
    resumed = [word.removeprefix("resume=").strip("'\"") for word in overrides if word.startswith("resume=")]
    return recipes_of(resumed[-1]) if resumed else []


def load_each(overrides: Sequence[str]) -> list[Composed]:
    """Compose every recipe of ``recipe=a,b,c`` with the same further overrides.

    Raises ConfigError for an override that does not fit all of them, and for a recipe that comes twice.
    """
    others = [word for word in overrides if not word.startswith("recipe=")]
    resumed = None if len(others) < len(overrides) else _resumed(overrides)
    fine: list[Composed] = []
    refused: dict[str, ConfigError] = {}
    for name in recipe_names(overrides):
        if not resumed:
            recipes.find(name)  # an unknown name is no matter of overrides
        saved_in = resumed / "selection" / name if resumed else None
        try:
            fine.append(load(others if resumed else [f"recipe={name}", *others], "select", saved_in))
        except ConfigError as error:
            refused[name] = error
    names = [composed.settings.recipe or "" for composed in fine]
    for name, error in refused.items():
        if not fine:
            raise error
        todo = f"{' and '.join(names)} would take it, but with several recipes an override must fit all of them."
        raise ConfigError(f"recipe {name}: {error.what}", error.where, todo)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"recipe {twice} is named twice", f"recipe={','.join(names)}", "Name it once.")
    _check_one_pool(fine)
    return fine


def _check_one_pool(methods: Sequence[Composed]) -> None:
    """Refuse recipes that select nothing, and recipes that would read different rows."""
    first = methods[0].settings
    for settings in (composed.settings for composed in methods):
        if not settings.selects:
            raise ConfigError(
                f"recipe {settings.recipe} selects no rows", f"recipe={settings.recipe}", "Leave it out of the list."
            )
        for key in POOL_KEYS:
            mine, others = getattr(settings.data, key), getattr(first.data, key)
            if mine != others:
                raise ConfigError(
                    f"recipes {first.recipe} and {settings.recipe} read different rows: data.{key} is {others} and {mine}",
                    todo=f"Set data.{key} on the command line, or select apart.",
                )
        if settings.seed != first.seed:
            raise ConfigError(f"recipes {first.recipe} and {settings.recipe} set different seeds", todo="Set seed=0.")


def _resumed(overrides: Sequence[str]) -> Path:
    return run_folder(str(next(one.value() for one in keys.read(overrides) if one.key_or_group == "resume")), "resume")


def check_all(overrides: Sequence[str], verb: str | None = None, limit: int = 32) -> None:
    """Check the first ``limit`` jobs of a sweep before any of them starts."""
    for job in islice(jobs_of(overrides), limit):
        load(job, verb)


def jobs_of(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of every job of a sweep, in the order of Hydra's own sweeper."""
    columns: list[list[str]] = []
    for override in parse(overrides):
        if override.is_choice_sweep() or override.is_range_sweep():
            columns.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        elif not override.is_sweep_override() and not override.key_or_group.startswith("hydra"):
            columns.append([str(override.input_line)])
    yield from map(list, product(*columns))


def resolve(
    config: DictConfig,
    choices: dict[str, Any],
    overrides: Sequence[str],
    base: Recipe | None = None,
    verb: str = "train",
) -> Composed:
    """Turn a composed Hydra config into Settings, refusing every key that nothing would read."""
    # unresolved: a text that was escaped once must not be resolved twice
    plain: Any = OmegaConf.to_container(config, resolve=False)
    plain.pop("hydra", None)
    try:
        raw: Any = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
    except OmegaConfBaseException as error:
        raise unresolved(plain) from error
    file = raw.pop(RECIPE_FILE, None)
    recipe = base or (recipes.find(file) if file else None)
    for slot in DEFAULT_CHOICES:
        if slot != "eval" and slot not in choices:
            raise slot_taken_away(slot)
    try:
        settings = _settings(raw, choices, recipe, verb)
    except ConfigError as error:
        raise _with_origin(error, recipe, overrides) from None
    return Composed(settings, recipe, _notes(recipe, settings))


def _settings(raw: dict[str, Any], choices: dict[str, Any], recipe: Recipe | None, verb: str) -> Settings:
    scoring = _section(raw, "select")
    picker = scoring.pop("picker", {})
    shared = _shared_select(scoring)
    slots: dict[str, tuple[str, dict[str, Any]]] = {}
    specs: list[Spec] = []
    for slot in SINGLE_SLOTS:
        values: Any = (
            {"picker": picker, "select": scoring}.get(slot) if slot in ("picker", "select") else raw.pop(slot, {})
        )
        spec = registry.find(slot, str(choices[slot]))
        prefix = "select.picker" if slot == "picker" else slot
        if slot == "tokens":
            values = values or {}
            given = {name: values.pop(name) for name in shared_tokens_knobs() if name in values}
            tokens = TokensConfig(check_section(given, shared_tokens_knobs(), "tokens")["from"])
        if spec.parts:
            slots[slot] = (spec.name, _parts(values, spec))
        else:
            slots[slot] = (spec.name, check_section(values, spec.knobs, prefix, f"{slot}={spec.name}"))
        specs += [registry.find(slot, part) for part in spec.parts] or [spec]
    evaluators = _evaluators(_section(raw, "eval"), recipe)
    specs += [registry.find("eval", name) for name, _ in evaluators]
    sections = {
        section: section_of(section, check_section(raw.pop(section, {}), section_knobs(section), section))
        for section in SECTIONS
    }
    for key in set(raw) - set(root_knobs()):
        todo = suggest(key, str(raw[key]), dict.fromkeys([*root_knobs(), *DEFAULT_CHOICES, *SECTIONS]))
        raise ConfigError(f'there is no key "{key}"', f"{key}={raw[key]}", todo)
    scalars = check_section(raw, root_knobs(), "")
    scalars["recipe"] = recipe.name if recipe else None
    settings = Settings(**scalars, **sections, slots=slots, eval=evaluators, select=shared, tokens=tokens)
    at_work = capabilities.slots_at_work(verb, settings.stages)
    working = [spec for spec in specs if spec.slot in at_work]
    capabilities.check_mix(working)
    capabilities.check_strategy(working, settings.launch)
    check_values(settings, trains="optim" in at_work)
    return settings


def _parts(values: dict[str, Any], several: Spec) -> dict[str, Any]:
    """Checked values of every component that the choice stands for, below its name."""
    for key in set(values) - set(several.parts):
        todo = f"Say whose it is: {several.slot}.{several.parts[0]}.{key}=..."
        raise ConfigError(
            f"{several.slot} are several methods, and {key} is none of them", f"{several.slot}.{key}", todo
        )
    found = {}
    for part in several.parts:
        spec = registry.find(several.slot, part)
        found[part] = check_section(values.get(part, {}), spec.knobs, f"{spec.slot}.{part}", f"{spec.slot}={part}")
    return found


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    values = raw.pop(name, None) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{name} is a section, not a value", f"{name}={values}")
    return values


def _shared_select(scoring: dict[str, Any]) -> SelectConfig:
    """Take the keys that every scorer shares out of the select section."""
    knobs = shared_select_knobs()
    model = check_section(scoring.pop("model", {}), {"path": knobs.pop("model.path")}, "select.model")
    given = {name: scoring.pop(name) for name in knobs if name in scoring}
    return SelectConfig(model_path=model["path"], **check_section(given, knobs, "select"))


def _evaluators(blocks: dict[str, Any], recipe: Recipe | None) -> list[tuple[str, dict[str, Any]]]:
    """The chosen evaluators in order. A recipe's values for one that was not chosen go; a user's are refused."""
    names = [name for name, values in blocks.items() if isinstance(values, dict) and values.pop(CHOSEN, False)]
    for name in set(blocks) - set(names):
        if not (recipe and name in recipe.blocks.get("eval", {})):
            registry.find("eval", name)
            todo = f"Add it: 'eval=[{','.join([*names, name])}]'."
            raise ConfigError(f"eval.{name} is set, but that evaluator does not run", f"eval.{name}", todo)
    return [
        (name, check_section(blocks[name], registry.find("eval", name).knobs, f"eval.{name}", f"eval={name}"))
        for name in names
    ]


def _with_origin(error: ConfigError, recipe: Recipe | None, overrides: Sequence[str]) -> ConfigError:
    """Name the recipe's file where the recipe, not the command line, holds the key."""
    key = error.where.split("=")[0]
    typed = any(override.lstrip("+~").split("=")[0] in (key, key.rpartition(".")[0]) for override in overrides)
    if recipe and not typed and recipe.sets(key):
        return ConfigError(error.what, f"{error.where} in {recipe.file}", error.todo)
    return error


def _notes(recipe: Recipe | None, settings: Settings) -> list[str]:
    """What the command line took out of the recipe, a line each."""
    if recipe is None:
        return []
    notes = []
    for slot in SINGLE_SLOTS:
        block = recipe.blocks.get(slot)
        if block and recipe.choice(slot) not in settings.choices(slot):
            dropped = ", ".join(f"{key}={value}" for key, value in block.items())
            notes.append(
                f"{slot}={settings.choice(slot)} replaces {recipe.choice(slot)}; the recipe's {dropped} went with it"
            )
    running = {name for name, _ in settings.eval}
    idle = [name for name in recipe.blocks.get("eval", {}) if name not in running]
    notes += [f"eval.{name} of the recipe is not used: that evaluator does not run" for name in idle]
    return notes
