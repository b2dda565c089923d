"""What Hydra is given: the root, every component, every group, and the recipes of a command line.

A recipe's values for a slot are stored apart, under the name of the component they belong to. The defaults list asks
for ``<recipe>--<choice>``, so that values meant for lora vanish by themselves when the command line says adapter=lisa,
inside a sweep too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf

from ftrun import registry
from ftrun.config import recipes
from ftrun.config.recipes import DEFAULT_CHOICES, GROUPS, Recipe
from ftrun.config.settings import SECTIONS, root_knobs, section_knobs, shared_select_knobs, shared_tokens_knobs
from ftrun.registry import Knob, Spec, nested

ROOT = "ftrun"
SINGLE_SLOTS = tuple(slot for slot in registry.SLOTS if slot != "eval")
# keys for ourselves, which no knob can be called
RECIPE_FILE = "_recipe_file"  # carries the file of a recipe into the processes of a sweep
CHOSEN = "_chosen"  # marks an evaluator that runs: Hydra does not tell the choices of a group that takes several


def populate(chosen: Recipe | Sequence[Recipe] = (), combined: Sequence[tuple[str, str]] = ()) -> None:
    """Put the root, every component and every group into Hydra's ConfigStore, and these recipes with their blocks.

    ``combined`` holds choices of several components as (slot, names joined by +); those of the recipes come by themselves.
    """
    wanted = [chosen] if isinstance(chosen, Recipe) else list(chosen)
    own = {(slot, name) for recipe in wanted for slot, name in recipe.choices.items() if registry.JOINT in str(name)}
    together = [(slot, name) for slot, name in dict.fromkeys([*combined, *own]) if slot in registry.COMBINED]
    store = ConfigStore.instance()
    # Hydra copies the whole store every time it composes, though it copies what it loads from it besides: a quarter of
    # the time, and more with every method
    store.__deepcopy__ = lambda memo: store  # type: ignore[attr-defined]
    store.repo.pop("_block", None)  # an earlier composition's
    _store_components(tuple(id(registry.specs(slot)) for slot in registry.SLOTS))
    for slot, name in together:
        nodes = {part: _node(registry.find(slot, part).knobs, {}) for part in registry.find(slot, name).parts}
        store.store(group=slot, name=name, node=OmegaConf.create(nodes), package=_package(slot))
    _store_recipe_names(("null", *recipes.catalogue()))
    for recipe in wanted:
        _store_recipe(store, recipe, together)


@functools.lru_cache(maxsize=1)
def _store_components(known: tuple[int, ...]) -> None:
    """The root, every component and every group: once, as long as the registry holds the same (``known``)."""
    store = ConfigStore.instance()
    store.store(name=ROOT, node=_root_node())
    for slot in registry.SLOTS:
        for spec in registry.specs(slot).values():
            package = f"eval.{spec.name}" if slot == "eval" else _package(slot)
            file = f"{spec.name}.yaml"
            store.repo.setdefault(slot, {})[file] = Later(file, slot, package, spec)
    for group in GROUPS:
        for file in group_files(group).values():
            store.store(group=group, name=file.stem, node=OmegaConf.load(file), package=group)


@functools.lru_cache(maxsize=1)
def _store_recipe_names(names: tuple[str, ...]) -> None:
    """Every recipe as an empty choice; those of a command line are filled each time."""
    for name in names:
        ConfigStore.instance().store(group="recipe", name=name, node=OmegaConf.create({}), package="_global_")


class Later(ConfigNode):
    """A component in the store whose node is made when somebody composes with it: few of them ever are."""

    def __init__(self, name: str, group: str, package: str, spec: Spec):
        self.name, self.group, self.package, self.provider = name, group, package, None
        self._spec, self._made = spec, None

    @property
    def node(self) -> DictConfig:  # type: ignore[override]
        if self._made is None:
            self._made = _node(self._spec.knobs, {CHOSEN: True} if self._spec.slot == "eval" else {})
        return self._made

    @node.setter
    def node(self, made: DictConfig) -> None:
        self._made = made


def group_files(group: str) -> dict[str, Any]:
    """The choices of ``model`` or ``data`` and their files."""
    return {file.stem: file for file in sorted((registry.PACKAGE / "conf" / group).glob("*.yaml"))}


def _store_recipe(store: ConfigStore, recipe: Recipe, together: Sequence[tuple[str, str]]) -> None:
    node = dict(recipe.values)
    node |= {"paper": recipe.paper, "fidelity": recipe.fidelity, "differences": recipe.differences}
    node[RECIPE_FILE] = str(recipe.file.resolve())
    node["defaults"] = [{f"override /{slot}": name} for slot, name in recipe.choices.items()]
    if "eval" in recipe.blocks:
        node["eval"] = recipe.blocks["eval"]
    store.store(group="recipe", name=recipe.name, node=OmegaConf.create(node), package="_global_")
    for slot in SINGLE_SLOTS:
        if recipe.blocks.get(slot):
            name = f"{recipe.name}--{recipe.choice(slot)}"
            block = OmegaConf.create(recipe.blocks[slot])
            store.store(group=f"_block/{slot}", name=name, node=block, package=_package(slot))
    for slot, several in together:
        # the recipe's values hold beside further methods too
        if recipe.blocks.get(slot) and recipe.choice(slot) in several.split(registry.JOINT):
            block = OmegaConf.create({recipe.choice(slot): recipe.blocks[slot]})
            store.store(group=f"_block/{slot}", name=f"{recipe.name}--{several}", node=block, package=_package(slot))


def _package(slot: str) -> str:
    return "select.picker" if slot == "picker" else slot


def _node(knobs: Mapping[str, Knob], others: dict[str, Any]) -> DictConfig:
    """Defaults as Hydra merges them: a knob that is a table takes any entry, everything else only what there is."""
    node = OmegaConf.create(nested({name: knob.default for name, knob in knobs.items()}) | others)
    for name, knob in knobs.items():
        if isinstance(knob.default, dict):
            OmegaConf.set_struct(node[name], False)
    return node


def _root_node() -> DictConfig:
    defaults: list[Any] = ["_self_", *({group: DEFAULT_CHOICES[group]} for group in GROUPS)]
    defaults += [{slot: name} for slot, name in DEFAULT_CHOICES.items() if slot not in GROUPS]
    defaults += [{"recipe": "null"}]
    defaults += [{f"optional _block/{slot}": f"${{recipe}}--${{{slot}}}"} for slot in SINGLE_SLOTS]
    node: dict[str, Any] = {"defaults": defaults, RECIPE_FILE: None}
    node |= {section: _node(section_knobs(section), {}) for section in SECTIONS}
    shared = {name: knob.default for name, knob in shared_select_knobs().items()}
    node["select"] = {"model": {"path": shared.pop("model.path")}, **shared}
    node["tokens"] = {name: knob.default for name, knob in shared_tokens_knobs().items()}
    node["eval"] = {}
    # a run makes its own folder; Hydra only sweeps
    node["hydra"] = {
        "run": {"dir": "."},
        "sweep": {"dir": "runs/.sweeps/${now:%Y%m%d-%H%M%S}", "subdir": "${hydra.job.num}"},
        "output_subdir": None,
        "job": {"chdir": False},
    }
    return _node({name: knob for name, knob in root_knobs().items() if name != "recipe"}, node)
