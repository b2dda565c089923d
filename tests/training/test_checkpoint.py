"""What a checkpoint must not be mistaken for: whole files of another version or of another run are refused by name."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ftrun.errors import CheckpointError
from ftrun.training import checkpoint
from ftrun.training.checkpoint import Progress


def parts(width: int = 3):
    """Parameters, their optimiser after one step, and an adapter with a state of its own."""
    torch.manual_seed(0)
    model = nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    state = {"drawn": [1, 2]}
    adapter = SimpleNamespace(state_dict=lambda: state, load_state_dict=lambda said: state.update(drawn=said["drawn"]))
    return dict(model.named_parameters()), optimizer, adapter


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(tmp_path, Progress(step=1, tokens=7, model="a", data="b"), *parts(), team=None)


def test_what_is_loaded_is_what_was_saved(saved):
    parameters, optimizer, adapter = parts()
    wanted = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
    assert checkpoint.load(saved, parameters, optimizer, adapter) == Progress(step=1, tokens=7, model="a", data="b")
    for name, parameter in parameters.items():
        assert torch.equal(parameter, wanted[name]), name


def renamed(tensors):
    tensors["other"] = tensors.pop(min(tensors))


def halved(tensors):
    for name in tensors:
        tensors[name] = tensors[name].half()


def told(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


CHANGES = {
    "a key that this version does not know": lambda path: told(path / "progress.json", samples=3),
    "another format": lambda path: told(path / "progress.json", format=checkpoint.FORMAT + 1),
    "no plain state that could be read": lambda path: (path / "optimizer.json").write_text("[]"),
    "a state told otherwise": lambda path: (path / "adapter_state.json").write_text('{"tree": {}}'),
    "other names": lambda path: rewrite(path / "trainable.safetensors", renamed),
    "narrower weights": lambda path: rewrite(path / "trainable.safetensors", halved),
    "a narrower state": lambda path: rewrite(path / "optimizer.safetensors", halved),
    "a state of other names": lambda path: rewrite(path / "optimizer.safetensors", renamed),
}


def rewrite(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("change", CHANGES)
def test_another_version_is_refused_by_name(change, saved):
    CHANGES[change](saved)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(saved, *parts())
    assert str(saved) in str(caught.value) and caught.value.todo


def test_a_progress_that_lacks_a_number_is_refused(saved):
    """Else it would begin again from 0; only the model's fingerprint is younger than the format."""
    plain = json.loads((saved / "progress.json").read_text())
    del plain["model"]
    (saved / "progress.json").write_text(json.dumps(plain))
    assert checkpoint.progress_of(saved).model == ""
    del plain["tokens"]
    (saved / "progress.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.progress_of(saved)


@pytest.mark.parametrize("manifest", ["", "[]", "{", '{"progress.json": {}}', '{"progress.json": 3}', "null", "\\x00"])
def test_a_damaged_manifest_is_no_whole_checkpoint(manifest, saved):
    assert checkpoint.newest_whole(saved.parent) == (saved, [])
    (saved / "manifest.json").write_text(manifest)
    assert checkpoint.newest_whole(saved.parent) == (None, [saved])


def test_the_millionth_step_is_newer_than_those_before(tmp_path):
    for step in (999_998, 999_999, 1_000_000):
        checkpoint.save(tmp_path, Progress(step=step), *parts(), team=None)
    (tmp_path / "step-999999 kept").mkdir()
    assert checkpoint.newest_whole(tmp_path)[0].name == "step-1000000"
    checkpoint.prune(tmp_path, keep=2, spare=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999", "step-999999 kept"]
