"""The loop: its result depends on the rows and the seed, and on nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from warm_processes import Popen

import ftrun
from ftrun import registry
from ftrun.errors import CheckpointError, ComponentError, ConfigError
from ftrun.runs.artifacts import whole_folder
from ftrun.training.loop import deal

QUICK = [
    "eval=[]",
    "data.heldout=0",
    "data.max_length=256",
    "train.batch_size=4",
    "train.max_steps=6",
    "optim.learning_rate=1e-3",
]
VARIANTS = {
    "lora": ["recipe=lora_sft", "adapter.r=4", "adapter.lora_dropout=0.1"],
    "full": ["recipe=sft"],
    "lisa": ["recipe=lisa", "adapter.layers=1", "adapter.interval=2"],
}


def words(variant: str, tiny_dir: Path, rows_file: Path, out: Path, *more: str) -> list[str]:
    return [*VARIANTS[variant], f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={out}", *QUICK, *more]


def train(*overrides: str) -> dict:
    return ftrun.run("train", overrides=list(overrides))


def weights(out: Path) -> dict[str, np.ndarray]:
    folder = sorted((out / "train/checkpoints").glob("step-*"))[-1]
    return {name: tensor.numpy().copy() for name, tensor in load_file(folder / "trainable.safetensors").items()}


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def assert_same_bits(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert np.array_equal(one[name], two[name]), name


def test_same_command_twice_same_weights(tiny_dir, rows_file, tmp_path):
    for name in "ab":
        train(*words("lora", tiny_dir, rows_file, tmp_path / name))
    assert_same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))


CUTS = ("train.batch_tokens=1", "train.batch_tokens=100", "train.packing=true")


@pytest.mark.slow
def test_cut_into_micro_batches_does_not_matter(tiny_dir, rows_file, tmp_path):
    """One row a micro-batch, padded groups or packed rows: the same losses to 1e-5."""
    train(*words("full", tiny_dir, rows_file, tmp_path / "whole"))
    for cut in CUTS:
        train(*words("full", tiny_dir, rows_file, tmp_path / cut, cut))
        np.testing.assert_allclose(
            losses(tmp_path / "whole"), losses(tmp_path / cut), rtol=1e-5, atol=1e-5, err_msg=cut
        )


class Killed(BaseException):
    """Stands for SIGKILL inside the process: nothing catches it."""


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.slow
def test_resume_equals_uninterrupted_to_the_bit(variant, packing, tiny_dir, rows_file, tmp_path, monkeypatch):
    """Killed in the middle of a step after an odd number of steps, resumed from the checkpoint before."""
    from ftrun.training import loop

    more = ["train.save_steps=2", f"train.packing={str(packing).lower()}"]
    train(*words(variant, tiny_dir, rows_file, tmp_path / "whole", *more))
    plain = loop.Trainer._clip
    steps = []

    def dies(self):
        steps.append(1)
        if len(steps) == 4:
            raise Killed
        return plain(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Trainer, "_clip", dies)
        train(*words(variant, tiny_dir, rows_file, tmp_path / "cut", *more))
    same = [
        word for word in words(variant, tiny_dir, rows_file, tmp_path / "cut", *more) if not word.startswith("out=")
    ]
    summary = train(*same, f"resume={tmp_path / 'cut'}")
    assert summary["status"] == "done" and summary["steps"] == 6
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "ftrun", "train", *overrides]


def wait_for_step(out: Path, step: int, process: Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = out / "train/metrics.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.02)
    raise AssertionError("the run never reached the step")


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "processes"), [("lora", 1), ("lisa", 2)])
def test_sigkill_and_resume(variant, processes, tiny_dir, rows_file, tmp_path):
    """A real SIGKILL at a random step."""
    more = ["train.save_steps=1", "train.max_steps=16", f"launch.processes={processes}", "launch.threads=1"]
    whole = words(variant, tiny_dir, rows_file, tmp_path / "whole", *more)
    train(*whole)
    cut = words(variant, tiny_dir, rows_file, tmp_path / "cut", *more)
    process = Popen(command(*cut), stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_step(tmp_path / "cut", int(np.random.default_rng().integers(2, 7)), process)
    kill_tree(process)
    resumed = [word for word in cut if not word.startswith("out=")]
    train(*resumed, f"resume={tmp_path / 'cut'}")
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def kill_tree(process: Popen) -> None:
    """SIGKILL to the launcher and to its workers, which live in sessions of their own."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    "number,code,status",
    [(signal.SIGTERM, 143, "preempted"), (signal.SIGUSR1, 143, "preempted"), (signal.SIGINT, 130, "interrupted")],
)
@pytest.mark.slow
def test_signals_save_and_exit(number, code, status, tiny_dir, rows_file, tmp_path):
    out = tmp_path / "run"
    endless = words("lora", tiny_dir, rows_file, out, "train.max_steps=100000")
    process = Popen(command(*endless), stderr=subprocess.PIPE, text=True)
    wait_for_step(out, 3, process)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == status and summary["steps"] >= 3
    saved = sorted((out / "train/checkpoints").glob("step-*"))
    assert saved and saved[-1].name == f"step-{summary['steps']:06d}"
    assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_two_processes_same_losses(tiny_dir, rows_file, tmp_path):
    """Two processes on gloo train what one process with accumulation trains: losses to 1e-5."""
    one = words("full", tiny_dir, rows_file, tmp_path / "one", "train.batch_tokens=150")
    two = words("full", tiny_dir, rows_file, tmp_path / "two", "launch.processes=2")
    for overrides in (one, two):
        train(*overrides)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5, atol=1e-5)


def test_nan_loss_stops_the_run(tiny_dir, rows_file, tmp_path):
    with pytest.raises(ComponentError, match="not a number at step"):
        train(
            *words(
                "full",
                tiny_dir,
                rows_file,
                tmp_path / "run",
                "optim.learning_rate=1e30",
                "train.max_grad_norm=null",
                "schedule=constant",
            )
        )
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "failed" and "learning_rate" in summary["error"]["message"]


def test_resume_refuses_another_recipe(tiny_dir, rows_file, tmp_path):
    train(*words("lora", tiny_dir, rows_file, tmp_path / "run"))
    with pytest.raises(CheckpointError, match="recipe=lora_sft"):
        train(
            *[w for w in words("full", tiny_dir, rows_file, tmp_path) if not w.startswith("out=")],
            f"resume={tmp_path / 'run'}",
        )


def test_resume_refuses_other_settings(tiny_dir, rows_file, tmp_path):
    train(*words("lora", tiny_dir, rows_file, tmp_path / "run"))
    same = [w for w in words("lora", tiny_dir, rows_file, tmp_path) if not w.startswith("out=")]
    with pytest.raises(CheckpointError, match=r"adapter\.r 4 -> 8"):
        train(*same, "adapter.r=8", f"resume={tmp_path / 'run'}")


def test_damaged_checkpoint_is_passed_over(tiny_dir, rows_file, tmp_path):
    """The newest whole checkpoint is resumed from; with none whole the run refuses."""
    overrides = words("lora", tiny_dir, rows_file, tmp_path / "run", "train.save_steps=2")
    train(*overrides)
    before = weights(tmp_path / "run")
    newest = sorted((tmp_path / "run/train/checkpoints").glob("step-*"))[-1]
    (newest / "trainable.safetensors").write_bytes(b"torn")
    resume = [w for w in overrides if not w.startswith("out=")] + [f"resume={tmp_path / 'run'}"]
    assert train(*resume)["steps"] == 6
    assert_same_bits(before, weights(tmp_path / "run"))
    for folder in (tmp_path / "run/train/checkpoints").glob("step-*"):
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        train(*resume)


def test_damaged_files_around_a_checkpoint(tiny_dir, rows_file, tmp_path):
    """What a run finds again is checked: tokens in the cache, its settings, the base model, the best checkpoint."""
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    overrides = words("lora", model, rows_file, tmp_path / "run", "train.save_steps=3", "data.heldout=0.2")
    overrides += ["train.eval_steps=3", "train.load_best=true", "eval=[heldout]"]
    train(*overrides)
    before, run = weights(tmp_path / "run"), tmp_path / "run"
    resume = [word for word in overrides if not word.startswith("out=")] + [f"resume={run}"]
    for tokens in (Path(os.environ["FTRUN_CACHE"]) / "data" / "tokens").glob("*/input_ids.npy"):
        tokens.write_bytes(tokens.read_bytes()[:-4] + b"\1\0\0\0")
    (run / "eval" / "before.json").write_text("")
    train(*resume)
    assert_same_bits(before, weights(run))
    assert json.loads((run / "eval" / "before.json").read_text())["heldout"]
    damaged = {
        run / "train/checkpoints/step-000003/progress.json": "step 3, is damaged",
        model / "model.safetensors": "its files have changed",
        run / "identity.json": r"identity\.json of the run is damaged",
    }
    best = run / "train/checkpoints/step-000006/progress.json"
    said = json.loads(best.read_text())
    with whole_folder(best.parent) as beside:  # the run says that the third step was the best
        for file in best.parent.iterdir():
            if file.name != "manifest.json":
                shutil.copy(file, beside)
        (beside / "progress.json").write_text(json.dumps(said | {"best_step": 3}))
    for file, message in damaged.items():
        whole = file.read_bytes()
        file.write_bytes(whole[:-2] + b"~~")
        with pytest.raises(CheckpointError, match=message):
            train(*resume)
        file.write_bytes(whole)


def test_out_is_used_once(tiny_dir, rows_file, tmp_path):
    train(*words("lora", tiny_dir, rows_file, tmp_path / "run"))
    with pytest.raises(ConfigError, match="already holds a run"):
        train(*words("lora", tiny_dir, rows_file, tmp_path / "run"))


def test_two_runs_with_one_out(tiny_dir, rows_file, tmp_path):
    from ftrun.runs.artifacts import RunLock

    with RunLock(tmp_path / "run"), pytest.raises(ConfigError, match="another run is writing"):
        train(*words("lora", tiny_dir, rows_file, tmp_path / "run"))


def test_out_not_writable(tiny_dir, rows_file, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        train(*words("lora", tiny_dir, rows_file, file / "below"))


def test_folder_read_only_from_the_end_of_training_on(tiny_dir, rows_file, tmp_path, monkeypatch):
    """Whatever writes then, the user hears which folder it is; a user who is root cannot be refused by its mode."""
    from ftrun.runs import artifacts

    def refused(*_, **__):
        raise PermissionError(1, "Operation not permitted", str(tmp_path / "run" / "adapter"))

    monkeypatch.setattr(type(registry.build("adapter", "lora")), "save", refused)
    with pytest.raises(ConfigError, match="cannot write adapter: Operation not permitted") as caught:
        train(*words("lora", tiny_dir, rows_file, tmp_path / "run"))
    assert str(tmp_path / "run") in str(caught.value)
    for folder, raised in [
        (tmp_path, PermissionError(13, "Permission denied", "/elsewhere/model.json")),  # read, not written
        (tmp_path, ValueError("no matter of disks")),
    ]:
        with pytest.raises(type(raised)), artifacts.run_guard(folder):
            raise raised
    with pytest.raises(ConfigError), artifacts.run_guard(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: Read-only file system (os error 30)")


def test_disk_full_while_saving(tiny_dir, rows_file, tmp_path, monkeypatch):
    """A full disk at a checkpoint ends the run with code 4, and the checkpoint before it stays whole."""
    from ftrun.errors import ResourceError
    from ftrun.training import checkpoint

    plain, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        plain(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        train(*words("lora", tiny_dir, rows_file, tmp_path / "run", "train.save_steps=1"))
    folders = sorted(path.name for path in (tmp_path / "run/train/checkpoints").iterdir())
    assert folders == ["step-000001", "step-000002"]
    assert checkpoint.newest_whole(tmp_path / "run/train/checkpoints")[0].name == "step-000002"


def test_batch_smaller_than_processes_is_refused():
    with pytest.raises(ConfigError, match="4 processes cannot share a step of 2 rows"):
        ftrun.run("train", "lora_sft", ["launch.processes=4", "train.batch_size=2"])


@given(st.lists(st.integers(1, 500), min_size=2, max_size=40), st.integers(1, 4))
def test_deal_shares_every_row_once(lengths, processes):
    rows = np.arange(len(lengths))
    shares = deal(rows, np.array(lengths), processes)
    assert sorted(np.concatenate(shares).tolist()) == rows.tolist()
    loads = [sum(lengths[row] for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)
