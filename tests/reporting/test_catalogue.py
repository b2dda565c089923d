"""`ftrun recipes` and `ftrun show`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from rich.console import Console

from ftrun import registry
from ftrun.config import recipes
from ftrun.config.compose import load
from ftrun.errors import ConfigError
from ftrun.reporting.catalogue import PURPOSES, first_sentence, plain, print_recipes, print_show, sections

MIXED = ["recipe=qlora_sft", "adapter.r=16", "select=superfiltering", "budget=0.25", "data.columns={output: answer}"]


def origins(overrides: list[str]) -> dict[str, str]:
    composed = load(overrides)
    return {
        value.key: value.origin
        for _, values, _ in sections(composed.settings, composed.recipe, overrides)
        for value in values
    }


def test_every_recipe_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    print_recipes(None, None, as_json=False)
    printed = capsys.readouterr().out
    assert all(name in printed for name in recipes.catalogue())


def test_the_list_as_json_holds_what_the_files_say(capsys: pytest.CaptureFixture[str]) -> None:
    print_recipes(None, None, as_json=True)
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(listed) == set(recipes.catalogue())
    qlora = listed["qlora_sft"]
    assert qlora["slots"]["quant"] == "nf4" and qlora["slots"]["select"] == "none"
    assert qlora["paper"]["arxiv"] == "2305.14314" and qlora["fidelity"] == "reference-checked"
    assert qlora["differences"] == recipes.find("qlora_sft").differences


@pytest.mark.parametrize(
    ("pattern", "slot", "expected"),
    [
        ("qlora*", None, {"qlora_sft"}),
        ("weak-to-strong", None, {"superfiltering", "superfiltering_d"}),  # a word of the paper's title
        (
            None,
            "tokens",
            {
                "talr",
                "augment_peft",
                "critical_token_ft",
                "tl_training",
                "gec_proofread",
                "fait",
                "horizon_length_prediction",
                "mft",
                "mutor",
                "multiverse",
                "lookahead_tuning",
                "pause_tuning",
                "edit_span",
                "symbol_tuning",
                "in_context_tuning",
                "cot_with_topic_qlora",
                "dft",
                "entropy_weighting",
                "rho1",
                "pear",
                "forgetting_sft",
                "rft_shad",
                "sstoken",
                "token_cleaning",
                "q_tuning",
                "neftune",
                "clinical_cpt_sft",
                "long_output_min",
                "riff_paraphrase",
            },
        ),
        (None, "quant", {"cot_with_topic_qlora", "qlora_sft", "loftq_sft"}),
        ("LISA", "adapter", {"lisa"}),
    ],
)
def test_the_list_can_be_narrowed(pattern, slot, expected, capsys: pytest.CaptureFixture[str]) -> None:
    print_recipes(pattern, slot, as_json=True)
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} == expected


def test_what_matches_nothing() -> None:
    with pytest.raises(ConfigError, match='no recipe matches "quantum"'):
        print_recipes("quantum", None, as_json=False)
    with pytest.raises(ConfigError) as error:
        print_recipes(None, "adaptor", as_json=False)
    assert error.value.todo == 'Did you mean "adapter"?'


def test_every_value_tells_where_it_comes_from() -> None:
    found = origins(MIXED)
    assert found["adapter.r"] == found["budget"] == found["data.columns"] == "command line"
    assert found["adapter.lora_alpha"] == found["train.batch_size"] == "recipe"
    assert found["adapter.bias"] == found["select.ratio"] == found["seed"] == "default"
    assert origins(["recipe=classify_lora"])["model.path"] == "recipe"
    assert origins(["data=demo_chat"])["data.path"] == "command line"


def test_a_swapped_slot_no_longer_has_the_recipes_values() -> None:
    found = origins(["recipe=lisa", "adapter=lora"])
    assert not {"adapter.layers", "adapter.interval"} & set(found) and found["adapter.r"] == "default"
    assert origins(["recipe=lora_sft", "adapter=lora"])["adapter.r"] == "recipe"


def test_show_prints_paper_differences_commands_and_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    composed = load(MIXED)
    print_show(composed, MIXED)
    printed = " ".join(capsys.readouterr().out.split())
    recipe = recipes.find("qlora_sft")
    for text in ("https://arxiv.org/abs/2305.14314", recipe.fidelity, *recipe.differences, *recipe.usage):
        assert " ".join(text.split()) in printed
    for _, values, _ in sections(composed.settings, recipe, MIXED):
        assert all(value.key in printed for value in values)


def test_show_says_what_the_chosen_components_do(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's formula, the rule for rows of several answers, and which picker stands behind `own`."""
    print_show(load(["recipe=tshirt"]), ["recipe=tshirt"])
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "S-IFD_j = exp(mean of d_t",
        "A row with several answers gets the mean over its answers.",
        "Here steady.",
    ):
        assert text in printed
    assert registry.find("objective", "sft").doc.split(". ")[0] not in printed  # of the plainest choices nothing


def test_show_without_a_recipe_and_with_notes(capsys: pytest.CaptureFixture[str]) -> None:
    print_show(load([]), [])
    assert "optim.learning_rate" in capsys.readouterr().out
    overrides = ["recipe=lora_sft", "adapter=ia3"]
    print_show(load(overrides), overrides)
    assert "adapter=ia3 replaces lora" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ([1, "a"], "[1,a]"),
        ({"a": None}, "{a: null}"),
        ("a\nb", r"'a\nb'"),
        ("", "''"),
        (0.5, "0.5"),
    ],
)
def test_values_as_one_types_them(value, text: str) -> None:
    assert plain(value) == text


def test_first_sentence() -> None:
    assert first_sentence("One. Two.") == "One."
    assert first_sentence("All of arXiv:1.2 in one.") == "All of arXiv:1.2 in one."


def test_listing_and_showing_import_nothing_heavy() -> None:
    program = """
import sys
from ftrun.config.compose import load
from ftrun.reporting.catalogue import PURPOSES, first_sentence, plain, print_recipes, print_show, sections
print_recipes(None, None, False)
print_show(load(["recipe=qlora_sft"]), ["recipe=qlora_sft"])
heavy = {"torch", "transformers", "peft", "datasets", "numpy", "pyarrow"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("columns", [80, 100])
def test_the_list_gives_a_line_to_each_by_what_it_is_for(columns, capsys, monkeypatch) -> None:
    monkeypatch.setattr("ftrun.reporting.catalogue._console", lambda: Console(width=columns))
    print_recipes(None, None, as_json=False)
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= columns
    names = [line.split()[0] for line in printed if line.startswith("  ")]
    assert sorted(names) == sorted(recipes.catalogue())
    assert [line for line in printed if line in PURPOSES] == list(PURPOSES)
    assert printed.index("weigh and edit tokens") < next(at for at, line in enumerate(printed) if "neftune " in line)


def test_the_list_tells_more_on_request(capsys) -> None:
    print_recipes("qlora_sft", None, as_json=False)
    assert "https://arxiv.org/abs/2305.14314" in capsys.readouterr().out
    print_recipes("lora", None, as_json=False)
    told, _, use_it = capsys.readouterr().out.partition("that use it (lora)")
    assert "  lora_sft " in told and "tshirt" not in told and "tshirt" in use_it
    print_recipes("*lora_sft", None, as_json=False, long=True)
    assert "reference-checked" in capsys.readouterr().out
