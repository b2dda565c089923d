"""One clear line for a command line that Hydra refused."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from ftrun import registry
from ftrun.config.recipes import DEFAULT_CHOICES
from ftrun.config.store import ROOT, group_files
from ftrun.errors import ConfigError, nearest

CHOICES = ("recipe", *DEFAULT_CHOICES)


def parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's reading of an override each; raises ConfigError for what is none."""
    parser, parsed = OverridesParser.create(), []
    for override in overrides:
        try:
            parsed += parser.parse_overrides([override])
        except HydraException as error:
            if "=" not in override:
                raise ConfigError(
                    f'"{override}" is not of the form key=value', override, "Write it as key=value."
                ) from None
            reason = " ".join(str(error).split("See https")[0].split())
            todo = "Quote values with special characters: 'key=\"a, b\"'."
            raise ConfigError("an override cannot be read", f"{override}: {reason}", todo) from None
    return parsed


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
    return ConfigError("the config cannot be composed", " ".join(str(error).split()))


def slot_taken_away(slot: str) -> ConfigError:
    plainest = f"Name the plainest choice: {slot}={DEFAULT_CHOICES[slot]}."
    return ConfigError(f"the slot {slot} was taken away", f"~{slot}", plainest)


def check_choice(slot: str, name: Any) -> None:
    """Raise ConfigError for a choice that the slot does not have."""
    if slot in registry.SLOTS:
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
    except HydraException:
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
            return ConfigError(f'there is no key "{key}"', line, _suggest(key, tree))
        node = node[part]
    return None


def _add_evaluator(names: list[str]) -> str:
    return f"Add it: 'eval=[{','.join(names)}]'."


def _suggest(key: str, tree: dict[str, Any]) -> str:
    """The nearest key: the same name in another section, a similar spelling, or a component that has such a knob."""
    known = list(_flat(tree))
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


def _flat(tree: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in tree.items():
        if key in registry.SLOTS and not value:
            continue  # its component has no knobs
        names += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return names
