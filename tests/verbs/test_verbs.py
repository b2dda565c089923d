"""What can be done with a finished run, and before one."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import ftrun
from ftrun import cli
from ftrun.errors import ConfigError
from ftrun.models import source
from ftrun.models.load import resolve_dtype
from ftrun.runs import code

pytestmark = pytest.mark.slow  # whole runs, one after the other

QUICK = [
    "data.heldout=0.2",
    "data.max_length=128",
    "train.max_steps=4",
    "train.batch_size=4",
    "optim.learning_rate=1e-2",
]


@pytest.fixture
def finished(tiny_dir, rows_file, tmp_path):
    out = tmp_path / "run"
    summary = ftrun.run("train", "lora_sft", [f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *QUICK])
    return out, summary


def test_eval_repeats_the_numbers_of_the_run(finished):
    """The saved adapter on a freshly loaded base gives what the run measured."""
    out, summary = finished
    again = ftrun.run("eval", overrides=[f"run={out}"])
    assert again["metrics"]["heldout"]["loss"] == pytest.approx(summary["metrics"]["heldout"]["loss"], abs=1e-6)


def test_eval_with_another_evaluator(finished):
    out, _ = finished
    result = ftrun.run(
        "eval",
        overrides=[f"run={out}", "eval=[generation]", "eval.generation.rows=2", "eval.generation.max_new_tokens=4"],
    )
    assert "generation" in result["metrics"] and (out / "eval/predictions/generation.jsonl").exists()


def test_eval_of_a_plain_model(tiny_dir, rows_file, tmp_path):
    result = ftrun.run("eval", overrides=[f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={tmp_path / 'e'}"])
    stored = json.loads((tmp_path / "e/eval/results.json").read_text())
    assert result["metrics"]["heldout"]["loss"] == stored["heldout"]["loss"]["value"]


def test_merge_gives_the_same_model(finished, tiny_dir, rows_file, tmp_path):
    """model/ loads without peft and evaluates like the run."""
    out, _ = finished
    ftrun.run("merge", overrides=[f"run={out}"])
    files = {file.suffix for file in (out / "model").iterdir()}
    assert ".safetensors" in files and not files & {".bin", ".pt"}
    merged = ftrun.run(
        "eval", overrides=[f"model.path={out / 'model'}", f"data.path={rows_file}", f"out={tmp_path / 'm'}"]
    )
    base = ftrun.run("eval", overrides=[f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={tmp_path / 'b'}"])
    assert merged["metrics"]["heldout"]["loss"] < base["metrics"]["heldout"]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "tied"),
    [
        (["lora", "target_modules=[q_proj,lm_head]"], False),
        (["lora", "target_modules=[embed_tokens]"], False),
        (["lora", "target_modules=[embed_tokens,lm_head]"], False),
        (["lora", "target_modules=[embed_tokens]", "ensure_weight_tying=true"], True),
        (["lora", "modules_to_save=[embed_tokens]"], False),
        (["lora", "modules_to_save=[lm_head]"], False),
        (["lora", "trainable_token_indices=[5,6,7]"], True),
        (["lora", "target_modules=[lm_head]", "use_rslora=true"], False),
        (["ia3", "target_modules=[k_proj,lm_head]", "feedforward_modules=[]"], False),
        (["lora"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_merge_into_tied_embeddings(adapter, tied, tiny_dir, rows_file, tmp_path):
    """model/ as transformers loads it gives the logits of the base with the adapter, as peft loads them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    words = [f"model.path={tiny_dir}", f"data.path={rows_file}", "model.dtype=float32", "stages=[train]", *QUICK]
    chosen = [f"adapter={adapter[0]}", *(f"adapter.{knob}" for knob in adapter[1:])]
    at_once = "embed_tokens" not in str(adapter)
    ftrun.run("train", "lora_sft", [*words, *chosen, f"train.merge={at_once}", f"out={out}"])
    if not at_once:
        ftrun.run("merge", overrides=[f"run={out}"])
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
        before = base(ids).logits
        expected = PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
        found = merged(ids).logits
    assert (expected - before).abs().max() > 1e-3
    assert torch.allclose(found, expected, atol=1e-5)
    assert merged.config.tie_word_embeddings == tied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("named", "revision", "adapter"),
    [
        ("owner/tiny", SHA, ["lora"]),
        ("owner/tiny", SHA, ["lora", "init_lora_weights=olora"]),  # written by us, not by peft
        ("owner/tiny", SHA, ["bottleneck"]),
        ("builtin:smollm2_135m", None, ["lora"]),
        ("./mine", None, ["lora"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value)[:10],
)
def test_what_is_saved_names_its_base_as_others_find_it(
    named, revision, adapter, tiny_dir, rows_file, tmp_path, monkeypatch
):
    """The hub's id and commit, the built-in name or the user's path; no path into a cache is left anywhere."""
    cache = tmp_path / "cache"
    snapshot = shutil.copytree(tiny_dir, cache / "models--owner--tiny" / "snapshots" / SHA)
    (tmp_path / "mine").symlink_to(snapshot)
    monkeypatch.setattr(source, "_from_hub", lambda model, weights: snapshot)
    monkeypatch.setattr(source, "builtin", lambda name: snapshot)
    monkeypatch.chdir(tmp_path)
    words = [f"model.path={named}", "model.revision=main", f"data.path={rows_file}", "stages=[train]", *QUICK]
    words += [f"adapter={adapter[0]}", *(f"adapter.{knob}" for knob in adapter[1:]), "train.max_steps=1"]
    ftrun.run("train", "lora_sft", [*words, f"train.merge={adapter[0] == 'lora'}", "out=run"])
    name = str(tmp_path / "mine") if named == "./mine" else named
    if adapter == ["bottleneck"]:
        about = json.loads((tmp_path / "run/adapter/bottleneck.json").read_text())
        assert (about["base_model"], about["revision"]) == (name, revision)
    else:
        about = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
        assert (about["base_model_name_or_path"], about["revision"]) == (name, revision)
    if adapter == ["lora"]:
        card = (tmp_path / "run/adapter/README.md").read_text()
        assert f"base_model: {name}\n" in card and f"base_model:adapter:{name}\n" in card
        assert f"**Finetuned from model:** {name}{f', revision {SHA}' if revision else ''}\n" in card
    left = [
        file for folder in ("adapter", "model") for file in (tmp_path / "run" / folder).rglob("*") if file.is_file()
    ]
    assert left and not [file for file in left if str(cache).encode() in file.read_bytes()]


def test_two_processes_merge_at_the_end(tiny_dir, rows_file, tmp_path):
    words = [
        f"model.path={tiny_dir}",
        f"data.path={rows_file}",
        "launch.processes=2",
        "launch.threads=1",
        "train.merge=true",
        "eval=[]",
    ]
    ftrun.run("train", "lora_sft", [f"out={tmp_path / 'run'}", *words, *QUICK])
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_generate_prints_the_answer(finished, capsys):
    out, _ = finished
    assert cli.entry(["generate", f"run={out}", "prompt=what is 1 plus 1?", "--json"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert "text" in json.loads(lines[-1])


def test_preview_colours_what_is_trained(tiny_dir, rows_file, tmp_path, capsys):
    words = [f"model.path={tiny_dir}", f"data.path={rows_file}", "data.max_length=128"]
    assert cli.entry(["preview", "recipe=lora_sft", *words]) == 0
    assert "answers:" in capsys.readouterr().out
    assert cli.entry(["preview", "recipe=lora_sft", *words, "--html", f"out={tmp_path}"]) == 0
    assert "<html" in (tmp_path / "preview.html").read_text()


@pytest.mark.parametrize("recipe", ["lora_sft", "sft", "lisa", "ia3_sft"])
def test_plan_counts_what_trains(recipe, tiny_dir, rows_file, tmp_path):
    """The plan's trainable and total parameters are those of the run."""
    words = [f"model.path={tiny_dir}", f"data.path={rows_file}", "data.max_length=128"]
    planned = ftrun.run("plan", recipe, words)
    run = ftrun.run("train", recipe, [*words, "train.max_steps=1", "eval=[]", f"out={tmp_path / 'run'}"])
    assert planned["trainable_parameters"] == run["trainable_parameters"]
    assert planned["total_parameters"] == run["total_parameters"]
    assert planned["stages"]["train"]["memory_bytes"] > 0


ALL_ROWS = ("data.heldout=0", "stages=[select,train]")  # plan counts the rows that training has: here all 24


def test_plan_counts_the_passes_of_the_scorer(tiny_dir, rows_file):
    """Superfiltering reads a row with its prompt and without; a random choice reads nothing."""
    words = [f"model.path={tiny_dir}", f"data.path={rows_file}", "data.max_length=128", *ALL_ROWS, "budget=6"]
    scored, drawn = (
        ftrun.run("plan", name, words)["stages"]["select"]["tokens"] for name in ("superfiltering", "random")
    )
    trained = ftrun.run("plan", "lora_sft", [*words[:-1], "train.batch_size=8"])["stages"]["train"]["tokens"]
    assert scored == pytest.approx(2 * trained) and drawn == 0


def test_selection_in_front_of_training(tiny_dir, rows_file, tmp_path):
    """Only chosen rows are trained, held-out rows are never chosen, and the same selection is not made twice."""
    words = [f"model.path={tiny_dir}", f"data.path={rows_file}", "select=superfiltering", "budget=6", *QUICK]
    first = ftrun.run("train", "lora_sft", [*words, f"out={tmp_path / 'a'}"])
    same = [f"model.dtype={str(resolve_dtype('auto', torch.device('cpu'))).removeprefix('torch.')}"]  # as auto gave it
    second = ftrun.run("train", "lora_sft", [*words, f"out={tmp_path / 'b'}", "optim.learning_rate=1e-3", *same])
    assert first["selected_rows"] == second["selected_rows"] <= 6
    log = (tmp_path / "b/ftrun.log").read_text()
    assert "reused" in log and "reused" not in (tmp_path / "a/ftrun.log").read_text()
    chosen = {json.loads(line)["id"] for line in (tmp_path / "a/selection/selected.jsonl").open()}
    import pyarrow.parquet as pq

    scored = set(pq.read_table(tmp_path / "a/selection/scores.parquet")["id"].to_pylist())
    assert chosen <= scored and len(scored) < 24


def test_evaluators_without_rows_are_refused_before_anything_is_done(tiny_dir, rows_file, tmp_path):
    """Not after the selection, which may take hours."""
    out = tmp_path / "run"
    words = [f"model.path={tiny_dir}", f"data.path={rows_file}", "select=superfiltering", "budget=6", f"out={out}"]
    with pytest.raises(ConfigError, match="eval=heldout has no rows: none were held out"):
        ftrun.run("train", "lora_sft", [*words, "data.heldout=0"])
    assert not (out / "selection").exists()


def test_rows_that_nothing_can_be_trained_on_are_left_out(tiny_dir, rows, tmp_path, capsys):
    """`data.unfit=drop` goes through the whole chain; other rows keep their numbers."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row | ({"output": ""} if i == 3 else {})) + "\n" for i, row in enumerate(rows)))
    words = ["recipe=superfiltering", f"model.path={tiny_dir}", f"data.path={file}", "budget=6"]
    assert cli.entry(["select", *words, f"out={tmp_path / 'a'}"]) == 3
    assert "row 3 of" in (said := capsys.readouterr().err) and "data.unfit=drop" in said
    assert cli.entry(["train", *words, "data.unfit=drop", *QUICK, f"out={tmp_path / 'b'}"]) == 0
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "b/selection/scores.parquet").to_pydict()
    assert 3 not in table["id"] and max(table["id"]) > 12
    chosen = [json.loads(line) for line in (tmp_path / "b/selection/selected.jsonl").open()]
    assert all(rows[row["id"]]["output"] == row["output"] for row in chosen)
    assert "1 row of" in (log := (tmp_path / "b/ftrun.log").read_text()) and "has an empty output" in log


def test_python_interface_raises_the_same_errors(tmp_path):
    from ftrun.errors import ConfigError, DataError

    with pytest.raises(ConfigError):
        ftrun.run("train", recipe="nope")
    with pytest.raises(DataError):
        ftrun.run("select", recipe="random", overrides=["data.path=no.jsonl", "budget=10", f"out={tmp_path / 'x'}"])


def test_random_selection_needs_no_model(rows_file, tmp_path, tiny_dir):
    summary = ftrun.run(
        "select",
        recipe="random",
        overrides=[f"data.path={rows_file}", "budget=10", f"out={tmp_path / 'r'}", f"model.path={tiny_dir}"],
    )
    assert summary["selected_rows"] == 10 and summary["steps"] == 0 and np.isfinite(summary["wall_s"])


def test_a_selection_is_kept_under_what_it_ran_on(rows_file, tmp_path, tiny_dir, monkeypatch):
    """The dtype that auto became, the text of the template, the versions; not where the model's files lie."""
    moved = shutil.copytree(tiny_dir, tmp_path / "moved")
    template = tmp_path / "own.jinja"
    template.write_text((moved / "chat_template.jinja").read_text())
    auto = str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    words = ["recipe=random", f"data.path={rows_file}", "budget=10", f"model.template={template}"]

    def reused(number: int, *more: str) -> bool:
        out = tmp_path / str(number)
        ftrun.run("select", overrides=[*words, f"out={out}", *more])
        return "reused" in (out / "ftrun.log").read_text()

    assert not reused(0, f"model.path={tiny_dir}")
    assert reused(1, f"model.path={moved}", f"model.dtype={auto}", "optim.learning_rate=1")
    assert not reused(2, f"model.path={moved}", "model.dtype=float16")
    template.write_text(template.read_text() + " ")
    assert not reused(3, f"model.path={moved}")
    assert reused(4, f"model.path={moved}")
    monkeypatch.setattr(code, "version", lambda name: "0.0")
    assert not reused(5, f"model.path={moved}")


@pytest.mark.parametrize(
    ("recipe", "knobs", "trained", "steps"),
    [
        ("ifd", [f"select.warmup{knob}" for knob in ("=8", "_clusters=4", "_batch_size=4", "_epochs=2")], 16, 4),
        ("dac_iter", ["select.picker.rounds=3", "select.picker.epochs=2", "select.picker.batch_size=4"], 24, 6),
        ("learning_percentage", ["select.epochs=3", "select.batch_size=8"], 72, 9),
        ("trim", ["select.warmup=0.25", "select.warmup_epochs=1"], 6, 1),
    ],
)
def test_plan_counts_what_the_selection_trains(recipe, knobs, trained, steps, tiny_dir, rows_file):
    """Of dac_iter the rounds before the last, each on all rows so far: 4 rows, then 8, twice each."""
    words = [f"model.path={tiny_dir}", f"data.path={rows_file}", "data.max_length=128", "budget=12", *knobs, *ALL_ROWS]
    stages = ftrun.run("plan", recipe, words)["stages"]
    mean = stages["train"]["tokens"] / (stages["train"]["steps"] * 16)  # of the first rows of the table
    found = stages["select training"]
    assert found["steps"] == steps and found["tokens"] == pytest.approx(trained * mean, rel=0.2)
    assert found["seconds"] > 0 and found["memory_bytes"] > 0
    assert "select training" not in ftrun.run("plan", "superfiltering", words[:4])["stages"]


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_what_does_not_train_takes_quantised_weights(quant, tiny_dir, rows_file, tmp_path, caplog):
    """Full fine-tuning is what a config without a recipe names, and neither verb does it."""
    words = [f"model.path={tiny_dir}", f"data.path={rows_file}", "model.dtype=float32", "data.max_length=128"]
    losses = []
    for name in ("none", quant):
        asked = [*words, "eval=[heldout]", f"quant={name}", f"out={tmp_path / name}"]
        losses.append(ftrun.run("eval", overrides=asked)["metrics"]["heldout"]["loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)
    assert "will be cast" not in caplog.text  # bitsandbytes would say so on every product
    ftrun.run("generate", overrides=[words[0], words[2], f"quant={quant}", "prompt=what is 1"])
    ftrun.run("select", "random", [*words, f"quant={quant}", "budget=4", f"out={tmp_path / 'select'}"])
    for verb in ("train", "plan", "preview"):
        with pytest.raises(ConfigError, match="trains all base weights"):
            ftrun.run(verb, "sft", [*words, f"quant={quant}"])


def test_packing_that_nobody_asked_for_refuses_nothing(tiny_dir, rows_file, tmp_path):
    """What else is in a batch decides how 8-bit layers round their inputs: rows stay apart, in scoring too."""
    words = [f"model.path={tiny_dir}", f"data.path={rows_file}", "model.dtype=float32", "quant=int8", *QUICK]
    words += ["quant.threshold=0.1"]  # a small model has no large features
    asked = [*words, "select=superfiltering", "budget=6", "stages=[select,train]", "train.max_steps=1"]
    assert ftrun.run("train", "lora_sft", [*asked, f"out={tmp_path / 'a'}"])["steps"] == 1
    with pytest.raises(ConfigError, match="mixes the documents"):
        ftrun.run("train", "lora_sft", [*words, "stages=[train]", "train.packing=true", f"out={tmp_path / 'b'}"])


def test_plan_of_slices(tiny_dir, rows_file, capsys):
    """A process holds its share of weights, gradients and optimiser, and whole what is at work; its activations are its own."""
    words = ["recipe=sft", f"model.path={tiny_dir}", f"data.path={rows_file}", "data.heldout=0", "train.batch_size=4"]
    memory = {}
    for name, more in {"copies": ["launch.strategy=ddp"], "slices": ["launch.strategy=fsdp"], "one": []}.items():
        processes = [] if name == "one" else ["launch.processes=4"]
        assert cli.entry(["plan", *words, *more, *processes, "--json"]) == 0
        memory[name] = json.loads(capsys.readouterr().out)["stages"]["train"]["memory_bytes"]
    parameters = 29_472
    held = parameters * (4 + 4 + 8)  # weight, gradient, two moments
    assert memory["copies"] == memory["one"]
    saved = memory["copies"] - memory["slices"]
    assert 0.75 * held - 4 * parameters < saved < 0.75 * held
