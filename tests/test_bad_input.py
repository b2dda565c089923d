"""What goes wrong in a user's hands: one clear message, the right exit code, nothing lost or half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm_processes

from ftrun import cli

pytestmark = pytest.mark.slow  # whole runs, one after the other

QUICK = ["eval=[]", "data.heldout=0", "data.max_length=128", "train.batch_size=4", "train.max_steps=3"]
RECORD = {".lock", "config.yaml", "ftrun.log", "identity.json", "lock.json", "report.html", "summary.json"}
GOOD = {"instruction": "what is 1 plus 1", "output": "answers: 2"}


@pytest.fixture
def ftrun_train(tiny_dir, rows_file, tmp_path, capsys):
    """Type ``ftrun train recipe=lora_sft`` with these words; gives the exit code and the message."""

    def typed(*words: str, out: str | Path | None = "run", recipe: str = "lora_sft") -> tuple[int, str]:
        given = {word.partition("=")[0] for word in words}
        line = ["train", f"recipe={recipe}", *(word for word in QUICK if word.partition("=")[0] not in given), *words]
        if "model.path" not in given:
            line.append(f"model.path={tiny_dir}")
        if "data.path" not in given:
            line.append(f"data.path={rows_file}")
        if out is not None:
            line.append(f"out={tmp_path / out}")
        capsys.readouterr()
        code = cli.entry(line)
        return code, message(capsys.readouterr().err)

    return typed


def message(printed: str) -> str:
    """The error at the end of what was printed: at most three lines, one each for what, where and what to do."""
    assert "Traceback" not in printed
    if "\nftrun: " not in "\n" + printed:
        return ""
    assert printed.count("ftrun: ") == 1, printed
    text = printed[printed.index("ftrun: ") :].strip()
    assert len(text.splitlines()) <= 3, text
    return text


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def strays(out: Path) -> list[str]:
    """Temporary files and folders that should have gone."""
    return [str(path) for path in out.rglob(".*") if path.name != ".lock"]


def write(file: Path, *rows: dict | str) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


# ---- rows ----


@pytest.mark.parametrize(
    ("rows", "where", "words"),
    [
        ([], "", "holds no rows"),
        (["", ""], "", "holds no rows"),
        ([GOOD, GOOD, '{"instruction": "a", "output": '], ":3", "line 3 of"),
        ([GOOD, "[1, 2]"], ":2", "is a list, not an object"),
        ([GOOD, {"instruction": "hello"}], ":2", "row 1 of ROWS has no output"),
        ([GOOD, {"instruction": "hello", "output": "  "}], ":2", "has an empty output"),
        (
            [GOOD, {"messages": [{"role": "user", "content": "a"}]}],
            ":2",
            "is messages, but the rows before it are alpaca",
        ),
        ([{"messages": [{"role": "user", "content": "a"}]}], ":1", "there is no response to train on"),
        ([GOOD, {"instruction": "a", "output": "the dog " * 400}], ":2", "longer than data.max_length=128"),
        ([{"instruction": "the dog " * 400, "output": "yes"}], ":1", "the response starts after that"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "", "Use recipe=dpo"),
    ],
    ids=[
        "empty",
        "blank",
        "broken",
        "list",
        "no-response",
        "empty-response",
        "mixed",
        "no-answer",
        "overlong",
        "no-room",
        "pairs",
    ],
)
def test_rows_are_refused(rows, where, words, ftrun_train, tmp_path):
    """Exit code 3, the place in the file, and a folder that holds no more than the record of the refusal."""
    file = write(tmp_path / "bad.jsonl", *rows)
    code, said = ftrun_train(f"data.path={file}")
    assert code == 3 and words.replace("ROWS", str(file)) in said and f"{file}{where}" in said
    assert {path.name for path in (tmp_path / "run").iterdir()} == RECORD
    record = summary(tmp_path / "run")
    assert record["status"] == "failed" and record["steps"] == 0 and record["error"]["exit_code"] == 3
    assert words.replace("ROWS", str(file)) in record["error"]["message"]


def test_missing_file_offers_the_nearest(ftrun_train, rows_file):
    code, said = ftrun_train(f"data.path={rows_file.with_name('row.jsonl')}")
    assert code == 3 and f'Did you mean "{rows_file.name}"?' in said


def test_the_folder_of_a_refused_run_may_be_used_again(ftrun_train, rows_file, tmp_path):
    """The mistake is repaired and the command typed again, with the same out."""
    file = write(tmp_path / "bad.jsonl", GOOD, "{broken")
    assert ftrun_train(f"data.path={file}")[0] == 3
    assert ftrun_train()[0] == 0 and summary(tmp_path / "run")["status"] == "done"
    code, said = ftrun_train()
    assert code == 2 and "already holds a run" in said and "resume=" in said


def test_a_killed_runs_checkpoints_are_not_written_over(ftrun_train, tmp_path):
    """SIGKILL leaves no summary.json, but what is there must be resumed, not mixed with a new run."""
    assert ftrun_train()[0] == 0
    (tmp_path / "run/summary.json").unlink()
    assert ftrun_train()[0] == 2


def test_changed_rows_are_not_resumed(ftrun_train, rows_file, tmp_path):
    assert ftrun_train("train.save_steps=1")[0] == 0
    rows_file.write_text(rows_file.read_text().replace("yes", "no"))
    code, said = ftrun_train("train.save_steps=1", f"resume={tmp_path / 'run'}", out=None)
    assert code == 3 and "the data is not what the run was started with" in said


@pytest.mark.parametrize("objective", ["dpo", "classify"])
def test_packing_is_refused_where_rows_must_stay_apart(
    ftrun_train, pairs_file, labels_file, tiny_encoder_dir, objective
):
    """Packed, the chosen text of a pair would be compared with the rejected text of another."""
    recipe, rows = {"dpo": ("dpo", pairs_file), "classify": ("classify_lora", labels_file)}[objective]
    model = [] if objective == "dpo" else [f"model.path={tiny_encoder_dir}"]
    code, said = ftrun_train(f"data.path={rows}", "train.packing=true", *model, recipe=recipe)
    assert code == 2 and f"objective={objective} needs every row apart" in said


# ---- model and tokenizer ----


@pytest.fixture
def changed_model(tiny_dir, tmp_path):
    """A copy of the tiny model's folder, to be spoilt."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def test_no_chat_template(changed_model, ftrun_train):
    (changed_model / "chat_template.jinja").unlink()
    code, said = ftrun_train(f"model.path={changed_model}")
    assert code == 2 and "no chat template" in said and "model.template=chatml" in said


def test_all_tokens_masked(ftrun_train, tmp_path):
    """A template that leaves the responses out."""
    template = tmp_path / "silent.jinja"
    template.write_text(
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    code, said = ftrun_train(f"model.template={template}")
    assert code == 3 and "leaves out what turn 2 (assistant) says" in said and "rows.jsonl:1" in said


def test_double_bos(changed_model, ftrun_train):
    file = changed_model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": "<|endoftext|>"}))
    template = changed_model / "chat_template.jinja"
    template.write_text("<|endoftext|><|endoftext|>" + template.read_text())
    code, said = ftrun_train(f"model.path={changed_model}")
    assert code == 3 and "begins with <|endoftext|> twice" in said


def test_vocabulary_mismatch(changed_model, ftrun_train):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(changed_model)
    config.vocab_size = 100
    LlamaForCausalLM(config).save_pretrained(changed_model)
    code, said = ftrun_train(f"model.path={changed_model}")
    assert code == 3 and "tokenizer and model do not fit" in said


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_model_file(name, changed_model, ftrun_train):
    file = changed_model / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code, said = ftrun_train(f"model.path={changed_model}")
    assert code == 2 and str(changed_model) in said and "again" in said


@pytest.mark.parametrize(("words", "code"), [(["model.path=some/model"], 2), (["data.path=some/rows"], 3)])
def test_hub_out_of_reach(words, code, ftrun_train, monkeypatch):
    """A dead address stands for no network; nothing is retried."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    got, said = ftrun_train(*words)
    assert (
        got == code and words[0].partition("=")[2] in said and ("cannot be reached" in said or "out of reach" in said)
    )


# ---- memory ----


def test_plan_and_train_warn_of_what_cannot_fit(ftrun_train, tiny_dir, rows_file, tmp_path, monkeypatch, capsys):
    from ftrun.runs import memory
    from ftrun.verbs import plan

    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000.0)
    monkeypatch.setattr(plan, "available_bytes", lambda device: 1000.0)
    assert cli.entry(["plan", "recipe=lora_sft", f"model.path={tiny_dir}", f"data.path={rows_file}"]) == 0
    assert "are needed" in capsys.readouterr().err
    assert ftrun_train()[0] == 0
    log = (tmp_path / "run/ftrun.log").read_text()
    assert "the weights may not fit" in log and "training may not fit" in log and "train.batch_tokens" in log


def test_limits_of_a_container_count(tmp_path):
    """The tightest of a group and the groups around it, files that it can give up not counted."""
    from ftrun.runs.memory import _cgroup_memory

    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    for folder, limit, used in ((inner, "max", 50), (tmp_path / "job", "1000", 700)):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(used))
        (folder / "memory.stat").write_text("anon 5\ninactive_file 100\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    assert _cgroup_memory(tmp_path, own) == 400


@pytest.mark.parametrize("where", ["backward", "optimizer", "loading", "selection"])
def test_allocation_failure(where, ftrun_train, tmp_path, monkeypatch):
    """A real refusal of torch's allocator at every stage: code 4, what was asked for, what to change."""
    from ftrun.optim.adamw import AdamW
    from ftrun.stages import attach, select
    from ftrun.training import loop

    def too_much(*_, **__):
        torch.empty(1 << 55, dtype=torch.uint8)

    class Greedy(torch.optim.SGD):
        step = too_much

    if where == "backward":
        monkeypatch.setattr(loop.Trainer, "_backward", too_much)
    elif where == "optimizer":
        monkeypatch.setattr(AdamW, "build", lambda self, named: Greedy([p for _, p in named], lr=0.1))
    elif where == "loading":
        monkeypatch.setattr(attach, "load_bundle", too_much)
    else:
        monkeypatch.setattr(select, "run_selection", too_much)
    words = ["select=longest", "budget=4"] if where == "selection" else []
    code, said = ftrun_train(*words)
    assert code == 4 and "not enough memory while" in said and "33554432.00 GiB more were asked for" in said
    assert len(said.splitlines()) == 3
    assert summary(tmp_path / "run")["status"] == "failed"
    assert not (tmp_path / "run/adapter").exists() and not strays(tmp_path / "run")


# ---- the disk ----


@pytest.mark.parametrize("out", ["/proc/nowhere", "file", "file/below"])
def test_out_cannot_be_written(out, ftrun_train, tmp_path):
    (tmp_path / "file").write_text("kept")
    code, said = ftrun_train(out=out)
    assert code == 2 and "cannot write" in said and "out=DIR" in said
    assert (tmp_path / "file").read_text() == "kept"


PROGRAM = """
import resource, signal, sys
from ftrun import cli
{patch}
sys.exit(cli.entry(sys.argv[1:]))
"""


def start(patch: str, *words: str) -> warm_processes.Popen:
    """The command line in a process of its own, with a few lines of Python in front."""
    command = [sys.executable, "-c", PROGRAM.replace("{patch}", patch), "train", *words]
    return warm_processes.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(process: warm_processes.Popen) -> tuple[int, str]:
    printed = process.communicate(timeout=120)[1]
    return process.returncode, message(printed)


@pytest.fixture
def line(tiny_dir, rows_file, tmp_path) -> list[str]:
    return ["recipe=lora_sft", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={tmp_path / 'run'}", *QUICK]


def resumed(line: list[str], out: Path, *more: str) -> list[str]:
    return ["train", *(word for word in line if not word.startswith("out=")), *more, f"resume={out}"]


@pytest.mark.slow
def test_a_file_that_the_system_will_not_let_grow(line, tmp_path):
    """A limit on file sizes stands for a full disk: the adapter's file is larger than all that is written before."""
    limit = "from ftrun.training import loop\nplain = loop.Trainer.run\ndef run(self, *rest):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n    return plain(self, *rest)\nloop.Trainer.run = run"
    code, said = ended(start(limit, *line, "train.save_steps=1"))
    assert code == 4 and "the disk is full while writing" in said and "Free some space" in said
    assert not list((tmp_path / "run").glob("train/checkpoints/step-*")) and not strays(tmp_path / "run")
    assert cli.entry(resumed(line, tmp_path / "run", "train.save_steps=1")) == 0
    assert summary(tmp_path / "run")["status"] == "done"


# ---- stopping ----

SLOW_STEPS = "from ftrun.training import loop\nimport time\nplain = loop.Trainer._backward\ndef slow(self, *rest):\n    print('in a step', file=sys.stderr, flush=True); time.sleep({seconds}); return plain(self, *rest)\nloop.Trainer._backward = slow"
SLOW_READING = "import ftrun.stages.rows as rows, time\nplain = rows.load_pool\ndef slow(*rest):\n    print('in a step', file=sys.stderr, flush=True); time.sleep(60); return plain(*rest)\nrows.load_pool = slow"
SLOW_SCORING = "from ftrun.training.scoring import Scoring\nimport time\nplain = Scoring._compute\ndef slow(self, *rest):\n    done = plain(self, *rest)\n    if self.computed > 8:\n        print('in a step', file=sys.stderr, flush=True); time.sleep(60)\n    return done\nScoring._compute = slow"


def wait_for(process: warm_processes.Popen, text: str) -> None:
    assert process.stderr is not None
    for printed in process.stderr:
        if text in printed:
            return
    raise AssertionError(f"ended with {process.wait()} before it said {text!r}")


def test_second_ctrl_c_does_not_wait(line, tmp_path):
    """The first only asks: the step goes on. The second ends it, without a checkpoint of half a step."""
    process = start(SLOW_STEPS.replace("{seconds}", "60"), *line, "train.max_steps=50")
    wait_for(process, "in a step")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    assert code == 130 and "interrupted" in said and f"resume={tmp_path / 'run'}" in said
    record = summary(tmp_path / "run")
    assert record["status"] == "interrupted" and record["steps"] == 0
    assert not list((tmp_path / "run").glob("train/checkpoints/step-*")) and not strays(tmp_path / "run")


@pytest.mark.slow
def test_first_ctrl_c_finishes_the_step_and_the_run_goes_on_later(line, tmp_path):
    process = start(SLOW_STEPS.replace("{seconds}", "0.5"), *line)
    wait_for(process, "in a step")
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    assert code == 130 and "after step 1, which is saved" in said
    assert summary(tmp_path / "run")["status"] == "interrupted"
    assert [path.name for path in (tmp_path / "run/train/checkpoints").iterdir()] == ["step-000001"]
    assert cli.entry(resumed(line, tmp_path / "run")) == 0
    record = summary(tmp_path / "run")
    assert record["status"] == "done" and record["steps"] == 3 and "error" not in record


@pytest.mark.parametrize(
    ("number", "code", "status"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "preempted")]
)
@pytest.mark.parametrize("stage", ["reading", "scoring"])
@pytest.mark.slow
def test_stopped_outside_training(stage, number, code, status, line, tmp_path):
    """At once, with what was scored so far on disk; the same command with resume goes on."""
    words = [*line, "select=superfiltering", "budget=0.5", "select.batch_tokens=64"]
    process = start(SLOW_READING if stage == "reading" else SLOW_SCORING, *words)
    wait_for(process, "in a step")
    process.send_signal(number)
    assert ended(process)[0] == code
    assert summary(tmp_path / "run")["status"] == status and not strays(tmp_path / "run")
    shards = list((tmp_path / "run").glob("selection/shards/*/*.npz"))
    assert bool(shards) == (stage == "scoring")
    assert cli.entry(resumed(words, tmp_path / "run")) == 0
    record = summary(tmp_path / "run")
    assert record["status"] == "done" and record["steps"] == 3 and record["selected_rows"] == 12
    assert not list((tmp_path / "run").glob("selection/shards"))


def test_a_library_that_rewords_an_interrupt(ftrun_train, tmp_path, monkeypatch):
    """Libraries catch every Exception and raise their own: the user pressed Ctrl-C all the same."""
    from ftrun.stages import rows

    def reworded(*_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except Exception as error:
            raise RuntimeError("failed to import a module") from error

    monkeypatch.setattr(rows, "load_pool", reworded)
    code, said = ftrun_train()
    assert code == 130 and "interrupted" in said
    assert summary(tmp_path / "run")["status"] == "interrupted"


# ---- resuming, and other runs ----


def test_a_refused_resume_leaves_the_run_alone(ftrun_train, tmp_path):
    """Another recipe, other settings: the finished run keeps its record."""
    assert ftrun_train()[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, said = ftrun_train(f"resume={tmp_path / 'run'}", out=None, recipe="sft")
    assert code == 2 and "is a run of recipe=lora_sft" in said
    code, said = ftrun_train(f"resume={tmp_path / 'run'}", "optim.learning_rate=7e-4", out=None)
    assert code == 2 and "optim.learning_rate" in said
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_no_run_to_resume(ftrun_train, tmp_path):
    code, said = ftrun_train(f"resume={tmp_path / 'nowhere'}", out=None)
    assert code == 2 and "there is no run in" in said and not (tmp_path / "nowhere").exists()


def test_a_second_run_leaves_the_first_alone(ftrun_train, tmp_path):
    from ftrun.runs.artifacts import RunLock

    with RunLock(tmp_path / "run"):
        code, said = ftrun_train()
        assert code == 2 and "another run is writing" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_what_a_kill_left_beside_the_checkpoints_goes(ftrun_train, tmp_path):
    assert ftrun_train("train.save_steps=1")[0] == 0
    left = tmp_path / "run/train/checkpoints/.step-000003.99999"
    left.mkdir()
    assert ftrun_train("train.save_steps=1", f"resume={tmp_path / 'run'}", out=None)[0] == 0
    assert not left.exists()


def test_failed_run_goes_on(ftrun_train, tmp_path, monkeypatch):
    """A component that failed once: code 5, the checkpoint before it is used when the run is resumed."""
    from ftrun.training import loop

    plain = loop.Trainer._clip

    def fails(self):
        if self.progress.step == 2:
            raise ZeroDivisionError("division by zero")
        return plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_clip", fails)
        code, said = ftrun_train("train.save_steps=1")
    assert code == 5 and "ZeroDivisionError: division by zero" in said and "FTRUN_DEBUG=1" in said
    record = summary(tmp_path / "run")
    assert record["status"] == "failed" and record["steps"] == 2 and record["error"]["exit_code"] == 5
    assert ftrun_train("train.save_steps=1", f"resume={tmp_path / 'run'}", out=None)[0] == 0
    assert "resuming from step-000002" in (tmp_path / "run/ftrun.log").read_text()
    assert summary(tmp_path / "run")["steps"] == 3


def test_a_report_that_cannot_be_drawn_does_not_fail_the_run(ftrun_train, tmp_path, monkeypatch):
    from ftrun.stages import recorded

    monkeypatch.setattr(recorded, "write_report", lambda out: 1 / 0)
    assert ftrun_train()[0] == 0
    assert summary(tmp_path / "run")["status"] == "done"
    assert "the report cannot be written" in (tmp_path / "run/ftrun.log").read_text()


@pytest.mark.slow
def test_unforeseen_failure_in_a_sweep(line, tmp_path, monkeypatch, capsys):
    """The other jobs go on, and Hydra's traceback stays away."""
    from ftrun.stages import rows

    plain = rows.load_pool
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows, "load_pool", lambda data, folder, seed: plain(data, folder, seed if seed == 0 else 1 / 0))
    words = [word for word in line if not word.startswith("out=")]
    assert cli.entry(["train", "-m", *words, "seed=0,1"]) == 5
    said = capsys.readouterr().err
    assert "a component failed: ZeroDivisionError" in said and "2 jobs, 1 failed" in said and "Traceback" not in said
    statuses = [summary(file.parent)["status"] for file in (tmp_path / "runs").glob("*/*/summary.json")]
    assert sorted(statuses) == ["done", "failed"]


# ---- several processes ----


def test_more_processes_than_asked_for(ftrun_train, monkeypatch):
    """Started under a launcher of the user's own without launch.processes."""
    from ftrun.training import distributed

    class Two(distributed.Accelerator):
        num_processes = 2

    monkeypatch.setattr(distributed, "Accelerator", Two)
    code, said = ftrun_train()
    assert code == 2 and "1 processes were asked for, 2 came up" in said and "launch.processes" in said


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        (
            "raise errors.DataError('row 3 is empty', 'rows.jsonl:4', 'Remove it.')",
            3,
            "row 3 is empty\n  rows.jsonl:4\n  Remove it.",
        ),
        ("time.sleep(60) if rank == 0 else os.kill(os.getpid(), 9)", 4, "process 1 of this run was killed (SIGKILL)"),
        ("time.sleep(60) if rank == 0 else os.kill(os.getpid(), 11)", 5, "process 1 of this run crashed (SIGSEGV)"),
        ("raise (errors.DataError('the cause') if rank else lost())", 3, "the cause"),
        ("1 / 0", 5, "ZeroDivisionError"),
    ],
    ids=["same-mistake", "killed", "crashed", "echo", "unforeseen"],
)
def test_a_worker_fails(program, code, words, tmp_path, monkeypatch):
    """The error of the process that failed first, once; the others are gone afterwards."""
    from ftrun.config.settings import LaunchConfig
    from ftrun.errors import FtrunError
    from ftrun.training import launch

    monkeypatch.setattr(launch, "LOST_SECONDS", 20 if "lost()" in program else 0.2)  # the cause may start late
    pids = tmp_path / "pids"
    text = f"""
import os, sys, time
from ftrun import cli, errors
rank = int(os.environ['RANK'])
open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')
def lost():
    error = errors.ComponentError('another process of this run has ended'); error.secondary = True; return error
def work(line): {program}
cli.dispatch = work
sys.exit(cli.entry(['train']))
"""
    with pytest.raises(FtrunError) as caught:
        launch.spawn(["-c", text], LaunchConfig(processes=2))
    assert caught.value.exit_code == code and words in str(caught.value)
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in started)


@pytest.mark.slow
def test_two_processes_say_it_once(line, tmp_path):
    """Both processes meet the broken line; one message, code 3, and a record."""
    file = write(tmp_path / "bad.jsonl", GOOD, "{broken")
    words = [f"data.path={file}" if word.startswith("data.path=") else word for word in line]
    command = [sys.executable, "-m", "ftrun", "train", *words, "launch.processes=2"]
    done = warm_processes.run(command, capture_output=True, text=True)
    assert done.returncode == 3 and "line 2 of" in message(done.stderr)
    assert summary(tmp_path / "run")["status"] == "failed"


@pytest.mark.slow
def test_workers_do_not_outlive_their_launcher(line, tmp_path):
    """SIGKILL to the launcher: the workers finish their step, save, and leave."""
    command = [sys.executable, "-m", "ftrun", "train", *line, "launch.processes=2", "train.max_steps=100000"]
    process = warm_processes.Popen(command, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "run/train/metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/summary.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert summary(tmp_path / "run")["status"] == "preempted"
