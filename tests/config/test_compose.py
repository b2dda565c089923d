"""Command lines that compose, and command lines that are refused with the nearest valid word."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrun.config.compose import check_all, load
from ftrun.errors import ConfigError

LORA = """\
# Mine.
#
#   ftrun train recipe=mine
paper: {title: Mine, year: 2026}
fidelity: from-paper
differences: []
defaults:
  - override /adapter: lora
adapter: {r: 5, lora_alpha: 7}
optim: {learning_rate: 1e-5}
train: {epochs: 2}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(LORA)
    return file


@pytest.mark.parametrize(
    ("overrides", "what", "todo"),
    [
        (["recipe=qlora_stf"], 'there is no recipe "qlora_stf"', 'Did you mean "qlora_sft"? See `ftrun recipes`.'),
        (["recipe=./none.yaml"], "there is no recipe file ./none.yaml", "Check the path."),
        (["adapter=lroa"], 'adapter has no choice "lroa"', 'Did you mean "lora"?'),
        (["eval=[heldout,generatoin]"], 'eval has no choice "generatoin"', 'Did you mean "generation"?'),
        (
            ["model=smollm"],
            'model has no choice "smollm"',
            'Did you mean "smollm2_135m"? For one of your own: model.path=...',
        ),
        (["data=gsm"], 'data has no choice "gsm"', "For one of your own: data.path=..."),
        (["adaptor=lora"], 'there is no key "adaptor"', 'Did you mean "adapter"?'),
        (["sed=1"], 'there is no key "sed"', 'Did you mean "seed"?'),
        (["learning_rate=1"], 'there is no key "learning_rate"', "Write optim.learning_rate=1"),
        (["train.epoch=1"], 'there is no key "train.epoch"', "Write train.epochs=1"),
        (["train.learning_rate=1"], 'there is no key "train.learning_rate"', "Write optim.learning_rate=1"),
        (["adapter=lora", "adapter.interval=5"], 'there is no key "adapter.interval"', "adapter=lisa has it."),
        (
            ["recipe=lora_sft", "adapter.lora_alfa=5"],
            'there is no key "adapter.lora_alfa"',
            'Did you mean "adapter.lora_alpha"?',
        ),
        (["data.columns={a: 1.5}"], "data.columns takes dict of text to text", ""),
        (["adapter.zz=1"], 'there is no key "adapter.zz"', "Known: adapter, budget, data,"),
        (
            ["eval.classification.batch_tokens=5"],
            "that evaluator does not run",
            "Add it: 'eval=[heldout,classification]'.",
        ),
        (
            ["+eval.classification.batch_tokens=5"],
            "that evaluator does not run",
            "Add it: 'eval=[heldout,classification]'.",
        ),
        (["+trian=1"], 'there is no key "trian"', "Did you mean"),
        (["+lr=1e-4"], 'there is no key "lr"', "Write optim.learning_rate=0.0001"),
        (["+train.epoch=1"], 'there is no key "train.epoch"', 'Did you mean "epochs"?'),
        (["+adapter.r=8"], 'adapter=none has no knob "r"', ""),
        (["adapter=lora", "+adapter.rank=8"], 'adapter=lora has no knob "rank"', ""),
        (["+adapter._target_=os.system"], 'adapter=none has no knob "_target_"', ""),
        (["+_target_=os.system"], 'there is no key "_target_"', ""),
        (["train=5"], "train is a section, not a value", "Set its keys, as in train.max_steps=..."),
        (["select.model=x"], "select.model is a section, not a value", "Set its keys, as in select.model.path=..."),
        (["~adapter"], "the slot adapter was taken away", "Name the plainest choice: adapter=none."),
        (["train.epochs=1,2"], "train.epochs has several values", "Put -m right after the verb"),
        (["adapter=lora,lisa"], "adapter has several values", "Put -m right after the verb"),
        (["train.epochs=many"], "train.epochs takes float, not 'many'", ""),
        (["train.max_steps=2.5"], "train.max_steps takes int | null, not 2.5", ""),
        (["model.dtype=float23"], "model.dtype takes auto | float32 | bfloat16 | float16", 'Did you mean "float32"?'),
        (["stages=train"], "stages takes list of select | train | eval", "Write a list: 'stages=[train]'."),
        (["stages=[]"], "there is no stage to run", ""),
        (["train.batch_size=0"], "train.batch_size must be above 0", ""),
        (["train.max_steps=-1"], "train.max_steps must be above 0", ""),
        (["data.heldout=1"], "data.heldout is a share", ""),
        (
            ["data.weights=[1,2]"],
            "data.weights has 2 numbers, but data.path has 1 sources",
            "Give one weight a source.",
        ),
        (["train.load_best=true"], "train.load_best needs", "Set both"),
        (
            ["train.load_best=true", "train.save_steps=2", "train.eval_steps=3"],
            "train.load_best needs a checkpoint at every evaluation",
            "a multiple of train.save_steps",
        ),
        (["budget=-3"], "budget -3 is not a budget", "Use a share"),
        (["optim.learning_rate=-0.01"], "optim.learning_rate must be at least 0, not -0.01", ""),
        (["optim.learning_rate=inf"], "optim.learning_rate must be at least 0 and finite", ""),
        (["optim.weight_decay=-1"], "optim.weight_decay must be at least 0", ""),
        (["optim.beta1=1"], "optim.beta1 must be at least 0 and below 1", ""),
        (["adapter=lora", "adapter.r=0"], "adapter.r must be at least 1", ""),
        (["adapter=lora", "adapter.lora_dropout=1.5"], "adapter.lora_dropout must be at least 0 and below 1", ""),
        (["schedule.warmup=1.5"], "schedule.warmup must be a share or a whole number", "Below 1 it is a share"),
        (["schedule.minimum=2"], "schedule.minimum must be at least 0 and at most 1", ""),
        (["select=ifd", "select.warmup_epochs=0"], "select.warmup_epochs must be above 0", ""),
        (["picker=dac_iter", "select.picker.learning_rate=-1"], "select.picker.learning_rate must be at least 0", ""),
        (["tokens=[rho1,neftune]", "tokens.rho1.reference_epochs=-1"], "tokens.rho1.reference_epochs must be", ""),
        (["eval=[generation]", "eval.generation.rows=0"], "eval.generation.rows must be at least 1", ""),
        (["seed=-1"], "seed must be 0 or above", ""),
        (["launch.rendezvous=alpha"], "launch.rendezvous is the address and port", "launch.rendezvous=alpha:29500"),
        (["launch.rendezvous=:29500"], "launch.rendezvous is the address and port", "launch.rendezvous=HOST:29500"),
        (["launch.restarts=-1"], "launch.restarts must be 0 or above", ""),
        (["launch.timeout=0"], "launch.timeout must be above 0", ""),
        (["launch.fsdp.offlaod=true"], 'there is no key "launch.fsdp.offlaod"', 'Did you mean "launch.fsdp.offload"?'),
        (["launch.fsdp=true"], "launch.fsdp is a section, not a value", "as in launch.fsdp.reshard_after_forward=..."),
        (["launch.node_rank=1"], 'there is no key "launch.node_rank"', "launch.rendezvous=HOST:PORT"),
        (["launch.port=29500"], 'there is no key "launch.port"', "launch.rendezvous=HOST:PORT"),
        (["fidelity=exact"], 'fidelity "exact" is unknown', ""),
        (["data.path=${nowhere}"], "a ${...} in the config stands for nothing", "the name of a key"),
        (["justaword"], '"justaword" is not of the form key=value', "Write it as key=value."),
        (['data.system="a'], "the value of data.system cannot be read", "Quote the value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(overrides: list[str], what: str, todo: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(overrides)
    assert what in error.value.what
    assert todo in error.value.todo
    assert "\n" not in error.value.what


def test_a_mix_that_cannot_work_names_the_way_out() -> None:
    with pytest.raises(ConfigError) as error:
        load(["recipe=qlora_sft", "adapter=lisa"])
    assert error.value.what == "adapter=lisa trains layers of the base weights; quant=nf4 freezes them in 4 bits"
    assert error.value.todo == "Use quant=none, or adapter=lora."
    assert load(["recipe=qlora_sft", "adapter=lisa", "quant=none", "tokens=talr"]).settings.choice("tokens") == "talr"


def test_the_plainest_config() -> None:
    settings = load([]).settings
    assert settings.recipe is None and settings.data.path == "builtin:gsm_symbolic:1000"
    assert [settings.choice(slot) for slot in ("select", "adapter", "quant", "objective")] == [
        "none",
        "none",
        "none",
        "sft",
    ]
    assert [name for name, _ in settings.eval] == ["heldout"]


def test_tables_take_entries() -> None:
    wanted = {"instruction": "question", "output": "answer"}
    assert load(["data.columns={instruction: question, output: answer}"]).settings.data.columns == wanted
    assert load(["data.columns.instruction=question", "+data.columns.output=answer"]).settings.data.columns == wanted
    knobs = load(["recipe=lora_sft", "adapter.rank_pattern={q_proj: 4}"]).settings.slots["adapter"][1]
    assert knobs["rank_pattern"] == {"q_proj": 4}


def test_the_command_line_wins_over_the_recipe_over_the_default() -> None:
    settings = load(["recipe=qlora_sft", "adapter.r=16"]).settings
    knobs = settings.slots["adapter"][1]
    assert (knobs["r"], knobs["lora_alpha"], knobs["bias"]) == (16, 16.0, "none")


def test_a_recipe_file(mine: Path) -> None:
    composed = load([f"recipe={mine}"])
    assert composed.settings.recipe == "mine" and composed.recipe is not None and composed.recipe.file == mine
    assert composed.settings.slots["adapter"][1]["r"] == 5
    assert composed.settings.slots["optim"][1]["learning_rate"] == 1e-5  # YAML 1.1 takes 1e-5 for text
    assert composed.settings.train.epochs == 2.0


def test_a_changed_recipe_file_leaves_nothing_behind(mine: Path) -> None:
    load([f"recipe={mine}"])
    mine.write_text(LORA.replace("adapter: {r: 5, lora_alpha: 7}\n", ""))
    assert load([f"recipe={mine}"]).settings.slots["adapter"][1]["r"] != 5


def test_a_file_does_not_stand_in_for_a_shipped_recipe_of_its_name(mine: Path) -> None:
    shadow = mine.rename(mine.with_name("lora_sft.yaml"))
    assert load([f"recipe={shadow}"]).settings.slots["adapter"][1]["r"] == 5
    assert load(["recipe=lora_sft"]).settings.slots["adapter"][1]["r"] == 8


def test_a_swapped_slot_takes_the_recipes_values_with_it(mine: Path) -> None:
    composed = load([f"recipe={mine}", "adapter=lisa", "adapter.layers=1"])
    assert composed.settings.slots["adapter"] == ("lisa", composed.settings.slots["adapter"][1])
    assert composed.settings.slots["adapter"][1]["layers"] == 1
    assert composed.notes == ["adapter=lisa replaces lora; the recipe's r=5, lora_alpha=7 went with it"]
    assert composed.settings.train.epochs == 2.0  # other values stay


def test_the_same_choice_typed_again_keeps_the_recipes_values(mine: Path) -> None:
    composed = load([f"recipe={mine}", "adapter=lora"])
    assert composed.settings.slots["adapter"][1]["r"] == 5 and not composed.notes


def test_a_picker_of_a_recipe(mine: Path) -> None:
    extra = "select: {picker: {maximum: 0.9}}\n"
    mine.write_text(
        LORA.replace("defaults:\n", "defaults:\n  - override /select: ifd\n  - override /picker: threshold\n") + extra
    )
    assert load([f"recipe={mine}"]).settings.slots["picker"][1]["maximum"] == 0.9
    composed = load([f"recipe={mine}", "picker=top_k"])
    assert composed.settings.choice("picker") == "top_k" and "threshold" in composed.notes[0]


def test_evaluators_run_in_the_order_given() -> None:
    settings = load(
        ["eval=[classification,heldout]", "eval.heldout.batch_tokens=77", "task=classify", "objective=classify"]
    ).settings
    assert [name for name, _ in settings.eval] == ["classification", "heldout"]
    assert dict(settings.eval)["heldout"]["batch_tokens"] == 77
    assert load(["eval=[]"]).settings.eval == []


def test_a_recipes_values_for_an_evaluator_that_does_not_run_go(mine: Path) -> None:
    mine.write_text(LORA + "eval: {classification: {batch_tokens: 9}}\n")
    composed = load([f"recipe={mine}"])
    assert [name for name, _ in composed.settings.eval] == ["heldout"]
    assert composed.notes == ["eval.classification of the recipe is not used: that evaluator does not run"]


@pytest.mark.parametrize(
    ("line", "what", "where"),
    [
        ("adapter: {rank: 8}", 'adapter=lora has no knob "rank"', "adapter.rank=8 in "),
        ("train: {epoch: 8}", 'there is no key "train.epoch"', "train.epoch=8 in "),
        ("speed: fast", 'there is no key "speed"', "speed=fast in "),
        ("budget: half", "budget 'half' is not a budget", "budget=half in "),
        ("adapter: {r: many}", "adapter.r takes int, not 'many'", "adapter.r=many in "),
    ],
)
def test_a_mistake_in_a_recipe_names_its_file(mine: Path, line: str, what: str, where: str) -> None:
    kept = "\n".join(row for row in LORA.splitlines() if row.split(":")[0] != line.split(":")[0])
    mine.write_text(f"{kept}\n{line}\n")
    with pytest.raises(ConfigError) as error:
        load([f"recipe={mine}"])
    assert error.value.what == what and error.value.where == f"{where}{mine.resolve()}"


def test_every_job_of_a_sweep_is_checked_first() -> None:
    check_all(["recipe=lora_sft,lisa", "optim.learning_rate=1e-4,3e-4", "seed=range(0,2)"])
    with pytest.raises(ConfigError, match="adapter=lisa trains layers"):
        check_all(["recipe=qlora_sft", "adapter=lora,lisa"])


def test_a_slot_swapped_inside_a_sweep() -> None:
    """adapter=lisa must not meet the recipe's r in any job."""
    check_all(["recipe=lora_sft", "adapter=lora,lisa,ia3,none"])


def test_settings_read_as_the_command_line_spells_them() -> None:
    plain = load(
        ["recipe=qlora_sft", "select=superfiltering", "select.model.path=small", "budget=0.25"]
    ).settings.as_dict()
    assert plain["select"]["name"] == "superfiltering" and plain["select"]["model"] == {"path": "small"}
    assert plain["select"]["picker"]["name"] == "own" and plain["adapter"]["r"] == 64
    assert plain["eval"]["heldout"] and plain["budget"] == 0.25


def test_a_recipe_file_in_a_folder_of_any_name(mine: Path, tmp_path: Path) -> None:
    """Which keys a verb reads is found out without reading the path as Hydra would."""
    folder = tmp_path / "josé's (first)"
    folder.mkdir()
    assert load([f"recipe={mine.rename(folder / mine.name)}"], "train").settings.recipe == mine.stem


@pytest.mark.parametrize(
    ("verb", "words", "refused"),
    [
        ("train", [], True),
        ("plan", [], True),
        ("preview", [], True),
        ("train", ["stages=[select,train]"], True),
        ("train", ["stages=[eval]"], False),
        ("train", ["stages=[select]"], False),
        ("eval", ["recipe=sft"], False),
        ("generate", ["recipe=sft"], False),
        ("select", [], False),
        ("eval", ["recipe=perturbation_sensitivity"], True),  # the evaluator changes the base weights
        ("select", ["recipe=perturbation_sensitivity"], False),
    ],
)
def test_components_clash_where_both_are_at_work(verb, words, refused):
    """Full fine-tuning of 4-bit weights, which only some verbs and stages would do."""
    read = verb in ("train", "plan", "preview", "select")  # the others have the adapter of the recipe
    asked = ["quant=nf4", *(["adapter=none"] if read else []), *words]
    if refused:
        with pytest.raises(ConfigError, match=r"quant=nf4"):
            load(asked, verb)
    else:
        load(asked, verb)
