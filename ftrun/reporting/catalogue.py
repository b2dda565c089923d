"""`ftrun recipes` and `ftrun show`: what there is, and what one recipe is made of. Imports nothing heavy."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ftrun import registry
from ftrun.config import recipes
from ftrun.config.cluster import ClusterConfig, cluster_knobs
from ftrun.config.recipes import DEFAULT_CHOICES, GROUPS, Recipe
from ftrun.config.settings import (
    SECTIONS,
    Settings,
    root_knobs,
    section_knobs,
    section_values,
    shared_select_knobs,
    shared_tokens_knobs,
)
from ftrun.errors import ConfigError, nearest
from ftrun.registry import Knob, type_name

if TYPE_CHECKING:
    from ftrun.config.compose import Composed


DOC_WIDTH = 120  # columns; longer lines of prose read badly


@dataclass(frozen=True)
class Value:
    """One key of a resolved config, with what a user wants to know of it."""

    key: str
    value: Any
    origin: str  # default, recipe or command line
    knob: Knob


class Section(NamedTuple):
    """Keys of a resolved config that belong together, below the component or the part that they are of."""

    title: str
    values: list[Value]
    doc: str = ""  # what the component does, where one was chosen on purpose


# ---- ftrun recipes ----


# what a recipe is for: the first slot of these in which it does something of its own
PURPOSES = {
    "select rows": ("select", "picker"),
    "weigh and edit tokens": ("tokens",),
    "another objective": ("objective",),
    "adapters and quantisation": ("adapter", "quant"),
    "measure a model": ("eval",),
    "all weights": (),
}


def print_recipes(pattern: str | None, slot: str | None, as_json: bool, long: bool = False) -> None:
    """Print the recipes whose name, components or description match; ``slot`` keeps those that choose something in it.

    One line each, by what they are for; ``long`` and the exact name of a recipe tell more. Raises ConfigError where
    nothing matches.
    """
    if slot is not None and slot not in DEFAULT_CHOICES:
        raise ConfigError(f'there is no slot "{slot}"', f"--slot {slot}", nearest(slot, DEFAULT_CHOICES))
    everything = [recipes.read(file) for file in recipes.catalogue().values()]
    found = [recipe for recipe in everything if _matches(recipe, pattern) and (slot is None or _chooses(recipe, slot))]
    if pattern and not found:
        raise ConfigError(
            f'no recipe matches "{pattern}"', "", nearest(pattern, [recipe.name for recipe in everything])
        )
    if as_json:
        print(json.dumps([describe(recipe) for recipe in found], indent=2, ensure_ascii=False))
        return
    console = _console()
    if long:
        console.print(_long_table(found))
    elif exact := [recipe for recipe in found if recipe.name == pattern]:
        _print_head(exact[0], console)
        others = [recipe for recipe in found if recipe not in exact and exact[0].name in recipe.name]
        _print_names("others with this in their name", others, console)
    else:
        # a word that is only the name of a component says little: half of all recipes choose lora
        told = [recipe for recipe in found if _tells(recipe, pattern)] or found
        _print_groups(told, console)
        _print_names(f"that use it ({pattern})", [recipe for recipe in found if recipe not in told], console)
    counted = f"{len(found)} of {len(everything)} recipes." if len(found) != 1 else "1 recipe."
    console.print(f"\n{counted} ftrun show NAME tells all of one; --long lists components and years.", style="dim")


def purpose(recipe: Recipe) -> str:
    """What a recipe is for, one of PURPOSES."""
    own = special_choices(recipe)
    if "adapter" in recipe.choices:
        own.pop("eval", None)  # it trains, and measures what came of it
    return next((name for name, slots in PURPOSES.items() if any(slot in own for slot in slots)), "all weights")


def _print_groups(found: Sequence[Recipe], console: Console) -> None:
    """A line each: the name, and as much of the first sentence as fits."""
    widest = max(len(recipe.name) for recipe in found)
    for name in PURPOSES:
        group = [recipe for recipe in found if purpose(recipe) == name]
        if group:
            console.print(f"\n[bold]{name}[/]")
        for recipe in group:
            line = Text.assemble("  ", (f"{recipe.name:<{widest}}", "cyan"), "  ", first_sentence(recipe.about))
            line.truncate(min(console.width, DOC_WIDTH), overflow="ellipsis")
            console.print(line, soft_wrap=True)


def _print_names(title: str, found: Sequence[Recipe], console: Console) -> None:
    if found:
        names = Text(", ".join(recipe.name for recipe in found))
        console.print(f"\n[bold]{escape(title)}[/]")
        console.print(Padding(names, (0, 0, 0, 2)), width=min(console.width, DOC_WIDTH))


def _long_table(found: Sequence[Recipe]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("recipe", style="bold", no_wrap=True)
    table.add_column("components", ratio=2)
    table.add_column("year", no_wrap=True)
    table.add_column("fidelity", no_wrap=True)
    table.add_column("good for", ratio=3)
    for recipe in found:
        chosen = " ".join(f"{key}={plain(name)}" for key, name in special_choices(recipe).items())
        year, about = str(recipe.paper.get("year", "")), first_sentence(recipe.about)
        table.add_row(recipe.name, escape(chosen), year, recipe.fidelity, escape(about))
    return table


def describe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, for --json."""
    return {
        "name": recipe.name,
        "file": str(recipe.file),
        "slots": {slot: recipe.choice(slot) for slot in DEFAULT_CHOICES},
        "paper": recipe.paper,
        "fidelity": recipe.fidelity,
        "differences": recipe.differences,
        "about": recipe.about,
        "usage": recipe.usage,
    }


def special_choices(recipe: Recipe) -> dict[str, Any]:
    """The choices of a recipe that are not the plainest ones."""
    return {slot: name for slot, name in recipe.choices.items() if name != DEFAULT_CHOICES[slot]}


def first_sentence(text: str) -> str:
    head, stop, _ = text.partition(". ")
    return head + "." if stop else text


def link(paper: dict[str, Any]) -> str:
    return f"https://arxiv.org/abs/{paper['arxiv']}" if paper.get("arxiv") else str(paper.get("url", ""))


def _chooses(recipe: Recipe, slot: str) -> bool:
    return recipe.choice(slot) != DEFAULT_CHOICES[slot]


def _matches(recipe: Recipe, pattern: str | None) -> bool:
    if not pattern:
        return True
    chosen = " ".join(plain(name) for name in recipe.choices.values()).lower()
    return _tells(recipe, pattern) or pattern.lower() in chosen


def _tells(recipe: Recipe, pattern: str | None) -> bool:
    """Whether the pattern is in the name, the description or the paper's title."""
    words = f"{recipe.name} {recipe.about} {recipe.paper.get('title', '')}".lower()
    return not pattern or fnmatch.fnmatch(recipe.name, pattern) or pattern.lower() in words


# ---- ftrun show ----


def print_show(composed: Composed, overrides: list[str]) -> None:
    """Print the paper, the differences, the commands and every knob of a composed config."""
    console = _console()
    if composed.recipe is not None:
        _print_head(composed.recipe, console)
    for note in composed.notes:
        console.print(note, style="yellow", markup=False)
    for title, values, doc in sections(composed.settings, composed.recipe, overrides):
        console.print(f"\n[bold]{escape(title)}[/]{'' if values else '  [dim]no knobs[/]'}")
        if doc:
            console.print(Padding(Text(doc.replace("``", "")), (0, 0, 1, 2)), width=min(console.width, DOC_WIDTH))
        if values:
            console.print(_knob_table(values))


def print_cluster(cluster: ClusterConfig, overrides: Sequence[str]) -> None:
    """Print every key of the cluster section, which only `ftrun submit` reads."""
    typed = {override.lstrip("+").split("=")[0] for override in overrides}
    values = [
        Value(f"cluster.{name}", value, _cluster_origin(name, value, knob, typed), knob)
        for (name, knob), value in zip(cluster_knobs().items(), vars(cluster).values(), strict=True)
    ]
    console = _console()
    console.print("\n[bold]cluster[/]  [dim]ftrun submit reads it[/]")
    console.print(_knob_table(values))


def _cluster_origin(name: str, value: Any, knob: Knob, typed: set[str]) -> str:
    if f"cluster.{name}" in typed or (value != knob.default and "cluster" in typed):
        return "command line"
    return "default"


def _print_head(recipe: Recipe, console: Console) -> None:
    paper = recipe.paper
    console.print(f"[bold]{recipe.name}[/]  {escape(recipe.about)}\n")
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    if paper:
        facts.add_row("paper", Text(str(paper.get("title", ""))))
        facts.add_row("", Text(f"{paper.get('authors', '')} ({paper.get('year', '')})  {link(paper)}"))
    facts.add_row("fidelity", recipe.fidelity)
    for at, difference in enumerate(recipe.differences or ["in nothing known"]):
        facts.add_row("" if at else "differs", Text(f"- {difference}" if recipe.differences else difference))
    for at, command in enumerate(recipe.usage):
        facts.add_row("" if at else "run it", Text(command, style="green"))
    facts.add_row("file", str(recipe.file))
    console.print(facts)


def _knob_table(values: Sequence[Value]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for style, wrap in (("cyan", True), ("", False), ("dim", True), ("dim", False), ("", False)):
        table.add_column(style=style, no_wrap=wrap, overflow="fold")
    for item in values:
        style = "" if item.origin == "default" else "bold"
        shown = f"[{style}]{escape(plain(item.value))}[/]" if style else escape(plain(item.value))
        table.add_row(item.key, shown, item.origin, escape(type_name(item.knob.type)), escape(item.knob.help))
    return table


def sections(settings: Settings, recipe: Recipe | None, overrides: Sequence[str]) -> Iterator[Section]:
    """Every knob of a resolved config, section by section, with its origin."""
    typed = {override.lstrip("+").split("=")[0] for override in overrides}

    def values(prefix: str, knobs: Mapping[str, Knob], of: dict[str, Any], of_recipe: bool = True) -> list[Value]:
        source = recipe if of_recipe else None
        return [
            Value(f"{prefix}{name}", of[name], _origin(f"{prefix}{name}", of[name], knob, typed, source), knob)
            for name, knob in knobs.items()
        ]

    root = {name: knob for name, knob in root_knobs().items() if name not in _TOLD_ELSEWHERE}
    yield Section("top level", values("", root, vars(settings)))
    for slot, (name, knobs) in settings.slots.items():
        prefix = "select.picker." if slot == "picker" else f"{slot}."
        # a recipe's values for a slot leave with its choice
        kept = recipe is not None and recipe.choice(slot) in name.split(registry.JOINT)
        parts = registry.find(slot, name).parts
        found = [] if parts else values(prefix, registry.find(slot, name).knobs, knobs, kept)
        for part in parts:
            found += values(f"{prefix}{part}.", registry.find(slot, part).knobs, knobs[part], kept)
        if slot == "select":
            shared = vars(settings.select) | {"model.path": settings.select.model_path}
            found += values(prefix, shared_select_knobs(), shared, kept)
        if slot == "tokens":
            found += values(prefix, shared_tokens_knobs(), {"from": settings.tokens.from_run}, kept)
        chosen_by = "command line" if slot in typed else "recipe" if recipe and slot in recipe.choices else "default"
        yield Section(f"{slot}={name}  ({chosen_by})", found, _doc(slot, name, settings))
    for name, knobs in settings.eval:
        spec = registry.find("eval", name)
        yield Section(f"eval={name}", values(f"eval.{name}.", spec.knobs, knobs), spec.doc)
    for section in SECTIONS:
        yield Section(section, values(f"{section}.", section_knobs(section), section_values(settings, section)))


def _doc(slot: str, name: str, settings: Settings) -> str:
    """What the components of a slot do, in their own words; of the plainest choice nothing."""
    if slot == "picker" and name == "own":
        name = registry.constant_of(registry.find("select", settings.choice("select")), "own_picker")
        return f"Here {name}.\n\n{registry.find(slot, name).doc}" if settings.choice("select") != "none" else ""
    if name == DEFAULT_CHOICES[slot]:
        return ""
    spec = registry.find(slot, name)
    return "\n\n".join(registry.find(slot, part).doc for part in spec.parts or (name,))


_TOLD_ELSEWHERE = ("paper", "fidelity", "differences", "recipe")


def _origin(key: str, value: Any, knob: Knob, typed: set[str], recipe: Recipe | None) -> str:
    if key in typed or any(one.startswith(f"{key}.") for one in typed):
        return "command line"
    if recipe is not None and recipe.sets(key):
        return "recipe"
    section = key.split(".")[0]
    if section in GROUPS and value != knob.default:  # comes with the choice of model= or data=
        return "command line" if section in typed else "recipe"
    return "default"


def plain(value: Any) -> str:
    """A value as one types it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(plain(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) + "}"
    text = str(value)
    return repr(text) if text != text.strip() or "\n" in text or not text else text


def _console() -> Console:
    """Standard output; wide enough not to fold a table when it goes to a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)
