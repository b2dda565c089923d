"""docs/ is what the registry and the recipes say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from composed import as_shipped

from ftrun import registry
from ftrun.config import recipes

sys.path.insert(0, str(registry.PACKAGE.parent / "scripts"))
import make_docs

pytestmark = pytest.mark.slow  # whole runs, one after the other


@pytest.fixture(scope="module")
def made() -> dict[Path, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            make_docs, "load", lambda overrides: as_shipped(*(word.removeprefix("recipe=") for word in overrides))
        )
        return make_docs.pages()


@pytest.fixture(scope="module")
def pages(made: dict[Path, str]) -> dict[str, str]:
    return {str(path): text for path, text in made.items()}


def test_docs_are_up_to_date(made: dict[Path, str]) -> None:
    assert not make_docs.outdated(made), "run `make docs`"


def test_one_page_a_recipe_with_its_own_values(pages: dict[str, str]) -> None:
    assert {f"recipes/{name}.md" for name in recipes.catalogue()} <= set(pages)
    page = pages["recipes/qlora_sft.md"]
    assert "| `adapter.r` | **`64`** | int | rank |" in page
    assert all(line in page for line in recipes.find("qlora_sft").differences)


def test_every_component_and_knob_is_there(pages: dict[str, str]) -> None:
    text = pages["components.md"]
    for slot in registry.SLOTS:
        for spec in registry.specs(slot).values():
            assert f"### {slot}={spec.name}\n" in text
            assert all(f".{knob}` |" in text for knob in spec.knobs)


def test_links_lead_somewhere(pages: dict[str, str]) -> None:
    anchors = {
        re.sub(r"[^a-z0-9_ -]", "", line[4:].lower()).replace(" ", "-")
        for line in pages["components.md"].splitlines()
        if line.startswith("### ")
    }
    for name, text in pages.items():
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            file, _, anchor = target.partition("#")
            there = file.removeprefix("../")
            assert there in pages or (registry.PACKAGE.parent / "docs" / there).is_file(), f"{name}: {target}"
            assert not anchor or anchor in anchors, f"{name}: {target}"
