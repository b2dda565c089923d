"""Writes docs/ from the recipes and the registry: `make docs`, or `python scripts/make_docs.py --check`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftrun import registry
from ftrun.adapters import peft_limits
from ftrun.config import recipes
from ftrun.config.cluster import cluster_knobs
from ftrun.config.compose import load
from ftrun.config.recipes import DEFAULT_CHOICES, Recipe
from ftrun.config.settings import SECTIONS, root_knobs, section_knobs, shared_select_knobs, shared_tokens_knobs
from ftrun.registry import Knob, Spec, type_name
from ftrun.reporting.catalogue import first_sentence, link, plain, sections, special_choices

DOCS = registry.PACKAGE.parent / "docs"
MADE = "<!-- made by `make docs`; edit the recipe or the component instead -->\n\n"
SLOT_ROLES = {
    "select": "gives every row a score; the picker turns scores and a budget into rows",
    "picker": "turns scores and a budget into rows; `own` is the picker of the scorer's paper",
    "tokens": "decides which tokens are trained, and how much each weighs",
    "adapter": "decides which parameters are trained",
    "quant": "how the base weights are stored",
    "objective": "the loss, and the kind of rows that it eats",
    "optim": "the optimiser",
    "schedule": "the learning rate over the run",
    "eval": "what is measured before and after; several at once: `'eval=[heldout,generation]'`",
}


def pages() -> dict[Path, str]:
    """Every page of docs/ by its path below it."""
    found = [recipes.read(file) for file in recipes.catalogue().values()]
    made = {Path("index.md"): index(found), Path("components.md"): components(), Path("settings.md"): settings()}
    made[Path("adapters.md")] = adapters()
    return made | {Path("recipes") / f"{recipe.name}.md": recipe_page(recipe) for recipe in found}


def index(found: list[Recipe]) -> str:
    rows = [
        [
            f"[{recipe.name}](recipes/{recipe.name}.md)",
            _choices(recipe),
            recipe.paper.get("year", ""),
            recipe.fidelity,
            first_sentence(recipe.about),
        ]
        for recipe in found
    ]
    return (
        f"{MADE}# Recipes\n\n"
        "Every recipe runs as `ftrun train recipe=NAME`; those that choose a `select` component also as `ftrun select recipe=NAME`. "
        "Any slot can be swapped on the command line. See also [components](components.md) and [settings](settings.md).\n\n"
        + _table(["recipe", "components", "year", "fidelity", "good for"], rows)
        + "\nFidelity: **reference-checked** follows the authors' code as read, with its properties and formulas tested (what ran beside that code stands in scripts/README.md); **from-paper** follows the paper's text; "
        "**reconstruction** fills in what the paper leaves open.\n"
    )


def recipe_page(recipe: Recipe) -> str:
    composed = load([f"recipe={recipe.name}"])
    paper = recipe.paper
    text = f"{MADE}# {recipe.name}\n\n{recipe.about}\n\n"
    text += f"**Paper.** {paper.get('authors', '')} ({paper.get('year', '')}). [{paper.get('title', '')}]({link(paper)})\n\n"
    text += f"**Fidelity.** {recipe.fidelity}\n\n**Differences from the paper or its code.**\n\n"
    text += "".join(f"- {line}\n" for line in recipe.differences) or "None known.\n"
    text += (
        "\n## Run it\n\n```bash\n" + "".join(f"{command}\n" for command in recipe.usage) + "```\n\n## Components\n\n"
    )
    rows = [
        [slot, _component_link(slot, name)] for slot, name in DEFAULT_CHOICES.items() for name in [recipe.choice(slot)]
    ]
    text += _table(["slot", "choice"], rows) + "\n## Knobs\n\nBold values are this recipe's own.\n"
    plain_sections = set(SECTIONS) - {"train", "data"}
    for title, values, _ in sections(composed.settings, recipe, []):
        shown = (
            [value for value in values if value.origin != "default"]
            if title in plain_sections | {"top level"}
            else values
        )
        if not shown:
            continue
        rows = [
            [
                f"`{value.key}`",
                _bold(f"`{plain(value.value)}`", value.origin == "recipe"),
                type_name(value.knob.type),
                value.knob.help,
            ]
            for value in shown
        ]
        text += f"\n### {title.split('  (')[0]}\n\n" + _table(["knob", "value", "type", "meaning"], rows)
    return text


def components() -> str:
    text = (
        f"{MADE}# Components\n\nOne slot a section; `slot=name` on the command line chooses, `slot.knob=value` sets.\n"
    )
    for slot in registry.SLOTS:
        text += (
            f"\n## {slot}\n\nThis slot {SLOT_ROLES[slot]}.\n"
            if slot in ("select", "picker", "tokens", "adapter")
            else f"\n## {slot}\n\n{SLOT_ROLES[slot].capitalize()}.\n"
        )
        for spec in registry.specs(slot).values():
            text += _component(spec)
    return text


SETTINGS = {
    "4 bits": "quant=nf4",
    "8 bits": "quant=int8",
    "merge": "train.merge=true",
    "packing": "train.packing=true",
    "checkpointing": "train.gradient_checkpointing=true",
    "fsdp": "launch.strategy=fsdp",
}


def adapters() -> str:
    """What every adapter can be combined with, from the tables that the tests verify."""
    rows, reasons = [], []
    for spec in registry.specs("adapter").values():
        unable = {title: _why_not(spec, setting) for title, setting in SETTINGS.items()}
        rows.append(
            [f"[{spec.name}](components.md#adapter{spec.name})", *("" if why else "yes" for why in unable.values())]
        )
        reasons += [
            f"- `adapter={spec.name}` with `{SETTINGS[title]}`: it {why}." for title, why in unable.items() if why
        ]
    left = [f"- `{name}` {why}." for name, why in sorted(peft_limits.LEFT_OUT.items())]
    return (
        f"{MADE}# What adapters can be combined with\n\nAn empty field is refused before anything is loaded, with its reason.\n\n"
        + _table(["adapter", *SETTINGS], rows)
        + "\n## Why not\n\n"
        + "\n".join(reasons)
        + "\n\n## Types of peft that are left out\n\n"
        + "\n".join(left)
        + "\n"
    )


def _why_not(spec: Spec, setting: str) -> str:
    if setting.startswith("quant=") and "trainable_base" in spec.needs:
        return spec.needs["trainable_base"] + ", which quantised weights freeze"
    if setting == "launch.strategy=fsdp":
        return spec.needs.get("whole_weights", "")
    return peft_limits.CANNOT[setting].get(spec.name, "")


def _component(spec: Spec) -> str:
    text = f"\n### {spec.slot}={spec.name}\n\n{spec.doc}\n"
    limits = [f"It {reason}." for reason in [*spec.needs.values(), *spec.lacks.values()]]
    if limits:
        text += "\n" + " ".join(limits) + "\n"
    prefix = "select.picker" if spec.slot == "picker" else f"eval.{spec.name}" if spec.slot == "eval" else spec.slot
    return text + ("\n" + _knobs(spec.knobs, f"{prefix}.") if spec.knobs else "")


def settings() -> str:
    text = f"{MADE}# Settings\n\nKeys that every recipe has.\n\n## Top level\n\n"
    text += _knobs(
        {name: knob for name, knob in root_knobs().items() if name not in ("paper", "fidelity", "differences")}, ""
    )
    text += "\n## select\n\nBeside the knobs of the chosen scorer:\n\n" + _knobs(shared_select_knobs(), "select.")
    text += "\n## tokens\n\nBeside the knobs of the chosen method, or of several: `tokens=[token_cleaning,talr]`.\n\n"
    text += _knobs(shared_tokens_knobs(), "tokens.")
    for section in SECTIONS:
        text += f"\n## {section}\n\n" + _knobs(section_knobs(section), f"{section}.")
    text += "\n## cluster\n\nOnly `ftrun submit` reads it ([clusters](cluster.md)).\n\n"
    return text + _knobs(cluster_knobs(), "cluster.")


def _knobs(knobs: Mapping[str, Knob], prefix: str) -> str:
    rows = [
        [
            f"`{prefix}{name}`",
            f"`{plain(knob.default)}`",
            type_name(knob.type),
            knob.help,
        ]
        for name, knob in knobs.items()
    ]
    return _table(["knob", "default", "type", "meaning"], rows)


def _choices(recipe: Recipe) -> str:
    return " ".join(f"`{slot}={plain(name)}`" for slot, name in special_choices(recipe).items())


def _component_link(slot: str, name: Any) -> str:
    if slot not in registry.SLOTS:
        return plain(name)
    names = name if isinstance(name, list) else [name]
    return ", ".join(f"[{one}](../components.md#{slot}{one})" for one in names)


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _table(heads: list[str], rows: list[list[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def outdated(wanted: dict[Path, str]) -> list[str]:
    """Of these pages those that differ from what is written or are missing, and those that are left over."""
    wrong = [
        str(path) for path, text in wanted.items() if not (DOCS / path).is_file() or (DOCS / path).read_text() != text
    ]
    return wrong + [str(left) for path in own_pages() if (left := path.relative_to(DOCS)) not in wanted]


def own_pages() -> list[Path]:
    """Pages that this program has written; others lie beside them, such as docs/torture.md."""
    return [path for path in sorted(DOCS.rglob("*.md")) if path.read_text().startswith(MADE)]


def main() -> None:
    if "--check" in sys.argv[1:]:
        wrong = outdated(pages())
        if wrong:
            sys.exit(f"docs/ is out of date, run `make docs`: {', '.join(wrong)}")
        return
    for path in own_pages():
        path.unlink()
    made = pages()
    for path, text in made.items():
        (DOCS / path).parent.mkdir(parents=True, exist_ok=True)
        (DOCS / path).write_text(text)
    print(f"wrote {len(made)} pages to {DOCS}")


if __name__ == "__main__":
    main()
