"""What a command line may change of a finished run, and what it must leave alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import ftrun
from ftrun import cli
from ftrun.errors import ConfigError

pytestmark = pytest.mark.slow  # whole runs, one after the other

WORDS = [
    "data.heldout=0.2",
    "data.max_length=128",
    "data.system=the lazy dog",
    "train.max_steps=4",
    "train.batch_size=4",
    "optim.learning_rate=1e-2",
    "schedule=constant",
    "model.dtype=float32",
]
ASKED = ["eval=[heldout,generation]", "eval.generation.rows=2", "eval.generation.max_new_tokens=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for runs that tests share, with a cache of its own."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTRUN_CACHE", str(folder / "cache"))
        yield folder


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def source(place, rows):
    return write(place / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def others(place):
    """Rows that no run has seen: 30, of which a share of 5% would be one or two."""
    return write(place / "other rows.jsonl", [{"instruction": f"is {i} a fox", "output": f"no {i}"} for i in range(30)])


@pytest.fixture(scope="module")
def finished(place, source, tiny_dir):
    """A run of lora_sft that must look at the end as it did at the start."""
    out = place / "run"
    ftrun.run(
        "train",
        "lora_sft",
        [f"model.path={tiny_dir}", f"data.path={source}", f"out={out}", "adapter.lora_dropout=0", *WORDS, *ASKED],
    )
    return out


def read(file):
    return json.loads(file.read_text())


def lines(file):
    return file.read_text().splitlines()


# ---- evaluation ----


@pytest.mark.parametrize(
    "words, count",
    [(["data.path={}"], 30), (["data.heldout_path={}"], 30), (["data.path={}", "data.heldout_limit=7"], 7)],
)
def test_named_rows_are_evaluated_whole_and_beside(words, count, finished, others, capsys):
    """No share is split off, the run's settings hold for the rest, and its own results are neither lost nor compared."""
    kept = {file: file.read_bytes() for file in (finished / "eval").glob("*.json")}
    predictions = (finished / "eval/predictions/heldout.jsonl").read_bytes()
    result = ftrun.run(
        "eval", overrides=[f"run={finished}", "eval=[heldout]", *(word.format(others) for word in words)]
    )
    said = capsys.readouterr().err
    assert (
        f"{count} " in said
        and "before" not in said
        and "better" not in said
        and result["results"] in "".join(said.split())
    )
    folder = finished / "eval" / result["results"].split("/eval/")[1].removesuffix("/results.json")
    assert folder.name.startswith("other_rows-") and str(folder) == result["out"]
    assert len(lines(folder / "predictions/heldout.jsonl")) == count
    about = read(folder / "summary.json")
    assert about["data"]["system"] == "the lazy dog" and about["data"]["max_length"] == 128 and about["steps"] == 4
    assert {file: file.read_bytes() for file in kept} == kept
    assert (finished / "eval/predictions/heldout.jsonl").read_bytes() == predictions


def test_a_single_key_leaves_the_others_to_the_run(finished, source):
    """Of the rows that the run held out, two; under another system prompt the same rows, though they say something else."""
    fewer = ftrun.run("eval", overrides=[f"run={finished}", "eval=[heldout]", "data.heldout_limit=2"])
    rows = [json.loads(line)["id"] for line in lines(finished / "eval/predictions/heldout.jsonl")]
    asked = [json.loads(line)["id"] for line in lines(finished / "eval" / _name(fewer) / "predictions/heldout.jsonl")]
    assert len(asked) == 2 and set(asked) < set(rows)
    assert read(finished / "eval" / _name(fewer) / "summary.json")["data"]["path"] == str(source)
    spoken = ftrun.run("eval", overrides=[f"run={finished}", "eval=[heldout]", "data.system=the quick brown fox"])
    again = [json.loads(line)["id"] for line in lines(finished / "eval" / _name(spoken) / "predictions/heldout.jsonl")]
    assert again == rows and _name(spoken) != _name(fewer)


def _name(result):
    return result["results"].split("/eval/")[1].removesuffix("/results.json")


def test_fewer_evaluators_leave_the_results_of_the_others(finished):
    """The run's own rows again: the same file, the same numbers, and what nobody asked for stays."""
    before = read(finished / "eval/results.json")
    result = ftrun.run("eval", overrides=[f"run={finished}", "eval=[heldout]"])
    assert read(finished / "eval/results.json") == before and list(before) == ["heldout", "generation"]
    assert result["out"] == str(finished) and result["results"] == str(finished / "eval/results.json")
    other_knobs = ftrun.run("eval", overrides=[f"run={finished}", "eval.generation.max_new_tokens=3"])
    assert read(finished / "eval/results.json") == before and other_knobs["out"] != str(finished)


def test_evaluation_goes_where_out_says(finished, others, tmp_path):
    out = tmp_path / "there"
    seen = sorted(str(file) for file in finished.rglob("*.json"))
    result = ftrun.run("eval", overrides=[f"run={finished}", f"data.path={others}", "eval=[heldout]", f"out={out}"])
    assert result["out"] == str(out) and (out / "eval/results.json").exists()
    assert sorted(str(file) for file in finished.rglob("*.json")) == seen
    with pytest.raises(ConfigError, match="already holds a run"):
        ftrun.run("eval", overrides=[f"run={finished}", "eval=[heldout]", f"out={out}"])


@pytest.mark.parametrize(
    "verb, words, key",
    [
        ("eval", ["run=RUN", "adapter.r=4"], "adapter.r"),
        ("eval", ["run=RUN", "seed=1"], "seed"),
        ("eval", ["run=RUN", "data.heldout=0.5"], "data.heldout"),
        ("eval", ["run=RUN", "data.limit=5"], "data.limit"),
        ("eval", ["run=RUN", "recipe=dpo"], "recipe"),
        ("eval", ["run=RUN", "model.path=x"], "model.path"),
        ("eval", ["run=RUN", "launch.processes=2"], "launch.processes"),
        ("eval", ["model.path=TINY", "train.max_steps=3"], "train.max_steps"),
        ("generate", ["run=RUN", "prompt=no", "out=x"], "out"),
        ("generate", ["run=RUN", "prompt=no", "seed=1"], "seed"),
        ("generate", ["model.path=TINY", "prompt=no", "optim=lion"], "optim"),
        ("merge", ["run=RUN", "adapter.r=4"], "adapter.r"),
        ("merge", ["run=RUN", "+seed=4"], "seed"),
        ("train", ["recipe=lora_sft", "prompt=no"], "prompt"),
        ("select", ["recipe=random", "run=RUN"], "run"),
        ("plan", ["recipe=lora_sft", "resume=RUN"], "resume"),
        ("preview", ["recipe=lora_sft", "out=x"], "out"),
    ],
)
def test_a_key_that_the_verb_would_ignore_is_refused(verb, words, key, finished, tiny_dir, capsys):
    words = [word.replace("RUN", str(finished)).replace("TINY", str(tiny_dir)) for word in words]
    assert cli.entry([verb, *words]) == 2
    said = capsys.readouterr().err
    assert key in said.splitlines()[0] and len(said.strip().splitlines()) <= 3


# ---- merging ----


def test_merge_writes_where_out_says(finished, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "merged_here"
    assert cli.entry(["merge", f"run={finished}", f"out={out}", "model.dtype=bfloat16"]) == 0
    assert not (finished / "model").exists()
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    assert cli.entry(["merge", f"run={finished}", f"out={out}"]) == 2
    assert "is not empty" in capsys.readouterr().err


# ---- training that goes on ----

FURTHER = ["train.max_steps=1", "train.batch_size=24", "data.heldout=0", "eval=[]", "data.system=the lazy dog"]
FURTHER += ["data.max_length=128", "model.dtype=float32", "optim.learning_rate=1e-4", "schedule=constant"]


def first_loss(out):
    return json.loads(lines(out / "train/metrics.jsonl")[0])["loss"]


def loss_of(words, source):
    words = [*words, f"data.path={source}", "eval=[heldout]", "data.max_length=128", "data.system=the lazy dog"]
    return ftrun.run("eval", overrides=words)["metrics"]["heldout"]["loss"]


@pytest.fixture(scope="module")
def untrained(place, source, tiny_dir):
    return loss_of([f"model.path={tiny_dir}", f"out={place / 'untrained'}"], source)


@pytest.mark.parametrize(
    "recipe, knobs, start",
    [
        ("lora_sft", ["adapter.lora_dropout=0"], "run={}"),
        ("lora_sft", ["adapter.lora_dropout=0", "adapter.init_lora_weights=pissa", "adapter.r=4"], "model.path={}"),
        ("ia3_sft", [], "model.path={}/adapter"),
        ("prefix_sft", ["adapter.prefix_projection=false", "adapter.encoder_hidden_size=null"], "run={}"),
        ("sft", ["adapter=bottleneck"], "run={}"),
        ("sft", [], "model.path={}"),
        ("lisa", ["adapter.layers=1"], "run={}"),
    ],
)
def test_training_goes_on_from_what_a_run_has_trained(recipe, knobs, start, source, tiny_dir, tmp_path, untrained):
    """The first loss is that of the run's model, the result moves on from there, and the lock names the ancestor."""
    one, two = tmp_path / "one", tmp_path / "two"
    data = [f"data.path={source}", *WORDS, "eval=[]", *knobs]
    ftrun.run("train", recipe, [f"model.path={tiny_dir}", f"out={one}", *data])
    choice = [word for word in knobs if word.startswith("adapter=")]
    further = ftrun.run("train", recipe, [start.format(one), f"data.path={source}", f"out={two}", *choice, *FURTHER])
    ended = loss_of([f"run={one}", f"out={tmp_path / 'a'}"], source)
    assert first_loss(two) == pytest.approx(ended, abs=2e-5) and abs(ended - untrained) > 1e-3
    assert loss_of([f"run={two}", f"out={tmp_path / 'c'}"], source) < ended
    assert further["trainable_parameters"] > 0
    ancestor = read(two / "lock.json")["fingerprints"]["ancestor"]
    assert ancestor["run"] == str(one) and ancestor["weights"]


def test_the_reference_is_where_training_began(finished, pairs_file, tmp_path):
    """Not the base: the first loss of DPO is that of two equal models, log 2."""
    words = [f"run={finished}", f"data.path={pairs_file}", f"out={tmp_path / 'run'}", *FURTHER, "train.batch_size=16"]
    ftrun.run("train", "dpo", ["adapter=lora", "quant=none", *words])
    assert first_loss(tmp_path / "run") == pytest.approx(0.693147, abs=1e-5)


def test_a_run_alone_goes_on_with_its_own_settings(finished, source, tmp_path):
    """No recipe named: that of the run, its data and its knobs, and what the command line changes."""
    summary = ftrun.run(
        "train", overrides=[f"run={finished}", f"out={tmp_path / 'run'}", "train.max_steps=1", "eval=[]"]
    )
    assert summary["recipe"] == "lora_sft" and summary["steps"] == 1
    config = (tmp_path / "run/config.yaml").read_text()
    assert str(source) in config and "the lazy dog" in config and f"run: {finished}" in config


@pytest.mark.parametrize(
    "verb, words, expected",
    [
        ("train", ["recipe=lisa", "run=RUN"], "has trained adapter=lora, and adapter=lisa cannot go on"),
        ("train", ["recipe=lora_sft", "run=RUN", "adapter.r=3"], "has r=8, and that cannot change"),
        ("plan", ["recipe=lora_sft", "run=RUN", "adapter.r=3"], "has r=8, and that cannot change"),
        ("train", ["recipe=lora_sft", "run=RUN", "model.path=elsewhere"], "stands on TINY, not on elsewhere"),
        ("train", ["recipe=classify_lora", "run=RUN"], "is a run of task=causal"),
        ("train", ["recipe=superfiltering", "adapter=lora", "model.path=RUN", "budget=3"], "ftrun merge run=RUN"),
        ("train", ["recipe=lora_sft", "run=nowhere"], "there is no run in nowhere"),
        ("select", ["recipe=superfiltering", "model.path=RUN", "budget=3", "out=OUT"], "ftrun merge run=RUN"),
        ("eval", ["model.path=RUN"], "Use run=RUN with eval"),
        ("eval", ["model.path=RUN/adapter"], "Use run=RUN with eval"),
        ("train", ["recipe=lora_sft", "model.path=STRANGE", "out=OUT"], "Merge it into its base some/base"),
    ],
)
def test_what_cannot_go_on_is_refused_by_name(verb, words, expected, finished, tiny_dir, tmp_path, capsys):
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    places = {"RUN": finished, "TINY": tiny_dir, "STRANGE": strange, "OUT": tmp_path / "out"}
    for name, place in places.items():
        words, expected = [word.replace(name, str(place)) for word in words], expected.replace(name, str(place))
    assert cli.entry([verb, *words]) == 2
    assert expected in capsys.readouterr().err


def test_a_base_that_has_changed_is_refused(finished, source, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    lock = read(run / "lock.json")
    lock["fingerprints"]["model"] = "another"
    (run / "lock.json").write_text(json.dumps(lock))
    with pytest.raises(ConfigError, match="is not the base that"):
        ftrun.run("train", "lora_sft", [f"run={run}", f"data.path={source}", f"out={tmp_path / 'two'}", *FURTHER])


def test_prompts_without_their_network_are_refused(source, tiny_dir, tmp_path):
    run = tmp_path / "run"
    words = [f"data.path={source}", "train.max_steps=1", "eval=[]"]
    ftrun.run("train", "prefix_sft", [f"model.path={tiny_dir}", f"out={run}", *words])
    with pytest.raises(ConfigError, match="not the network that made them"):
        ftrun.run("train", "prefix_sft", [f"run={run}", f"out={tmp_path / 'two'}", *words])


# ---- resuming ----


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run, to be resumed in a folder of its own."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def losses(out):
    return [json.loads(line)["loss"] for line in lines(out / "train/metrics.jsonl")]


def test_a_longer_run_goes_on_alone(copied, finished, source, tiny_dir, tmp_path, capsys):
    """resume= alone says everything else; with a schedule that never looks at the end, as if it had never stopped."""
    ftrun.run("merge", overrides=[f"run={copied}"])
    summary = ftrun.run("train", overrides=[f"resume={copied}", "train.max_steps=6"])
    said = capsys.readouterr().err
    assert "goes on to step 6 instead of 4; schedule=constant has given the steps so far the same rates" in said
    assert summary["steps"] == 6 and summary["recipe"] == "lora_sft" and not (copied / "model").exists()
    whole = tmp_path / "whole"
    words = [f"model.path={tiny_dir}", f"data.path={source}", f"out={whole}", "adapter.lora_dropout=0", "eval=[]"]
    ftrun.run("train", "lora_sft", [*words, *WORDS, "train.max_steps=6"])
    assert losses(copied) == losses(whole) and losses(copied)[:4] == losses(finished)
    assert (copied / "adapter/adapter_model.safetensors").read_bytes() == (
        whole / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_a_resumed_run_must_agree(copied, capsys):
    """Neither shorter nor otherwise; what was refused leaves no trace in the settings of the run."""
    config = (copied / "config.yaml").read_text()
    assert cli.entry(["train", f"resume={copied}", "train.max_steps=3"]) == 2
    assert "was started with 4 steps, and 3 are asked for" in capsys.readouterr().err
    assert cli.entry(["train", f"resume={copied}", "optim.learning_rate=1e-3"]) == 2
    assert "optim.learning_rate 0.01 -> 0.001" in capsys.readouterr().err
    assert cli.entry(["train", f"resume={copied}", "adapter.rr=1"]) == 2
    assert 'Did you mean "adapter.r"?' in capsys.readouterr().err
    kept = (copied / "config.yaml").read_text()
    assert kept.replace(f"resume: {copied}", "resume: null") == config.replace(f"out: {_out(config)}", "out: null")


def _out(config):
    return next(line.removeprefix("out: ") for line in config.splitlines() if line.startswith("out: "))


def test_a_schedule_that_follows_the_length_says_so(source, tiny_dir, tmp_path, capsys):
    out = tmp_path / "run"
    words = [f"model.path={tiny_dir}", f"data.path={source}", f"out={out}", "eval=[]", *WORDS, "schedule=linear"]
    ftrun.run("train", "lora_sft", [*words, "train.max_steps=1"])
    ftrun.run(
        "train", "lora_sft", [f"resume={out}", *words[:2], "eval=[]", *WORDS, "schedule=linear", "train.max_steps=2"]
    )
    assert (
        "schedule=linear now follows the new length: the rates so far were those of 1 steps" in capsys.readouterr().err
    )


def test_a_selection_is_trained_on_and_made_again(source, tiny_dir, tmp_path):
    """resume= of a selection alone: select does it again, train goes on with it; of several recipes too."""
    out, both = tmp_path / "run", tmp_path / "both"
    words = [f"model.path={tiny_dir}", f"data.path={source}", "budget=4", *WORDS]
    ftrun.run("select", "random", [f"out={out}", *words])
    assert cli.entry(["select", f"resume={out}"]) == 0
    assert ftrun.run("train", overrides=[f"resume={out}", "eval=[]"])["steps"] == 4
    assert cli.entry(["select", "recipe=random,longest", f"out={both}", *words]) == 0
    assert cli.entry(["select", f"resume={both}"]) == 0
    with pytest.raises(ConfigError, match="holds what random and longest selected, and no trained model"):
        ftrun.run("train", overrides=[f"resume={both}"])


@pytest.mark.parametrize("verb, words", [("eval", []), ("merge", []), ("generate", ["prompt=no"]), ("train", [])])
def test_a_run_of_several_selections_has_no_model(verb, words, tmp_path):
    (tmp_path / "config.yaml").write_text("recipe: random,longest\n")
    with pytest.raises(ConfigError, match="holds what random and longest selected, and no trained model"):
        ftrun.run(verb, overrides=[f"run={tmp_path}", *words])
