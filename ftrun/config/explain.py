"""One clear line for a command line that Hydra refused."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftrun import registry
from ftrun.config import recipes
from ftrun.config.grammar import check_key
from ftrun.config.recipes import DEFAULT_CHOICES
from ftrun.config.store import ROOT, group_files
from ftrun.config.words import our_words, wrong_choice
from ftrun.errors import ConfigError, nearest

CHOICES = ("recipe", *DEFAULT_CHOICES)
SEVERAL = ("eval", *registry.COMBINED)  # slots that take a list


def parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's reading of an override each; raises ConfigError for what is none."""
    parser, parsed = OverridesParser.create(), []
    for override in overrides:
        try:
            parsed += parser.parse_overrides([override])
        except (HydraException, RecursionError, ValueError, AssertionError):
            key, _, value = override.partition("=")
            check_key(override)
            todo = f"Quote the value to make it text: '{key}=\"...\"'. A comma separates values, [a,b] is a list."
            raise ConfigError(f"the value of {key} cannot be read", f"{key}={value}", todo) from None
        check_key(override)
    for override in parsed:
        _check_named(override)
    return parsed


def _check_named(override: Override) -> None:
    """Raise ConfigError for a choice that is no name, as in quant=0."""
    slot, line = override.key_or_group, str(override.input_line)
    if slot not in CHOICES or override.is_delete() or override.is_sweep_override():
        return
    value: Any = override.value()
    for one in value if isinstance(value, list) and slot in SEVERAL else [value]:
        if isinstance(one, (str, QuotedString)) or (slot == "recipe" and one is None):
            continue
        if isinstance(one, (list, dict)):
            name = one[0] if isinstance(one, list) and len(one) == 1 else "NAME"
            raise ConfigError(f"{slot} takes one name", line, f"Write {slot}={name}")
        check_choice(slot, line.partition("=")[2].strip() if one is value else "null" if one is None else one)


def explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Why the overrides do not compose: an unknown choice or key, or several values without a sweep."""
    parsed = [override for override in parse(overrides) if not override.key_or_group.startswith("hydra")]
    for override in parsed:
        if override.is_sweep_override():
            todo = "Put -m right after the verb to run every one of them, or write a list: 'key=[a,b]'."
            return ConfigError(f"{override.key_or_group} has several values", str(override.input_line), todo)
        if override.is_delete() and override.key_or_group in DEFAULT_CHOICES:
            return slot_taken_away(override.key_or_group)
    chosen = [override for override in parsed if override.key_or_group in CHOICES and not override.is_delete()]
    for override in chosen:
        if override.key_or_group != "recipe":
            value: Any = override.value()
            for one in value if isinstance(value, list) else [value]:
                check_choice(override.key_or_group, one)
    tree = _tree([str(override.input_line) for override in chosen])
    for override in parsed:
        if override.key_or_group not in CHOICES and tree is not None:
            wrong = _unknown_key(override, tree)
            if wrong:
                return wrong
    return ConfigError(
        "these words do not make a config", _culprit(parsed), "Take that part away, or see `ftrun show`."
    )


def _culprit(parsed: Sequence[Override]) -> str:
    """The override that does not even compose alone; all of them where each does."""
    lines = [str(override.input_line) for override in parsed]
    return next((line for line in lines if _tree([line]) is None), " ".join(lines))


def unresolved(plain: dict[str, Any]) -> ConfigError:
    """Which ``${...}`` stands for nothing."""
    config = OmegaConf.create(plain)
    where = ""
    for key in (name for name in flat(plain) if not name.startswith("paper")):
        try:
            OmegaConf.select(config, key)
        except (OmegaConfBaseException, ValueError):
            where = f"{key}={_leaf(plain, key)}"
            break
    return ConfigError("a ${...} in the config stands for nothing", where, "It takes the name of a key, as in ${seed}.")


def _leaf(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node[part]
    return node


def slot_taken_away(slot: str) -> ConfigError:
    plainest = f"Name the plainest choice: {slot}={DEFAULT_CHOICES[slot]}."
    return ConfigError(f"the slot {slot} was taken away", f"~{slot}", plainest)


def check_choice(slot: str, name: Any) -> None:
    """Raise ConfigError for a choice that the slot does not have."""
    if slot == "recipe":
        recipes.find(str(name))
    elif slot in registry.SLOTS:
        if str(name) not in registry.specs(slot) and registry.JOINT not in str(name):
            raise wrong_choice(slot, str(name))
        registry.find(slot, str(name))
    elif str(name) not in (known := group_files(slot)):
        todo = f"{nearest(str(name), known)} For one of your own: {slot}.path=..."
        raise ConfigError(f'{slot} has no choice "{name}"', f"{slot}={name}", todo)


def _tree(choices: list[str]) -> dict[str, Any] | None:
    """The config that these choices alone give; None where they do not compose."""
    GlobalHydra.instance().clear()
    try:
        with initialize(version_base=None, config_path=None):
            config = hydra_compose(ROOT, overrides=choices)
    except (HydraException, ValueError, AssertionError, TypeError, AttributeError):
        return None
    return _public(OmegaConf.to_container(config, resolve=False))


def _public(node: Any) -> Any:
    """Without the keys that we keep for ourselves."""
    if not isinstance(node, dict):
        return node
    return {key: _public(value) for key, value in node.items() if not str(key).startswith("_")}


def _unknown_key(override: Override, tree: dict[str, Any]) -> ConfigError | None:
    key, line = override.key_or_group, str(override.input_line)
    parts = key.split(".")
    if parts[0] == "eval" and len(parts) > 1 and parts[1] not in tree["eval"] and parts[1] in registry.specs("eval"):
        return ConfigError(
            f"{key} is set, but that evaluator does not run", line, _add_evaluator([*tree["eval"], parts[1]])
        )
    node: Any = tree
    for part in parts:
        if not isinstance(node, dict) or part not in node:
            return ConfigError(f'there is no key "{key}"', line, suggest(key, line.partition("=")[2], tree))
        node = node[part]
    return None


def _add_evaluator(names: list[str]) -> str:
    return f"Add it: 'eval=[{','.join(names)}]'."


def suggest(key: str, value: str, tree: dict[str, Any]) -> str:
    """What to type instead: the word for it here, the same name in another section, a similar spelling, or a component
    that has such a knob."""
    ours = our_words(key, value)
    if ours:
        return f"Write {ours}"
    known = list(flat(tree))
    last = key.split(".")[-1]
    same = [name for name in known if name.split(".")[-1] == last]
    elsewhere = [
        f"{slot}={spec.name}"
        for slot in registry.SLOTS
        for spec in registry.specs(slot).values()
        if key == f"{slot}.{last}" and last in spec.knobs
    ]
    if elsewhere:
        return f"{' and '.join(elsewhere)} {'has' if len(elsewhere) == 1 else 'have'} it."
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close or same:
        return f'Did you mean "{(same or close)[0]}"?' if len(same) == 1 or not close else f'Did you mean "{close[0]}"?'
    section = key.rpartition(".")[0]
    inside = [name.removeprefix(f"{section}.") for name in known if section and name.startswith(f"{section}.")]
    return nearest(last, inside or {name for name in known if "." not in name} | set(tree))


def flat(tree: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in tree.items():
        if key in registry.SLOTS and not value:
            continue  # its component has no knobs
        names += flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return names
