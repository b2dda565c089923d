"""Checkpoints: whole or not at all, safetensors and JSON only, and the newest whole one is the one to resume from.

Where each process holds a slice of the weights they are torch's distributed checkpoints, each slice a safetensors file.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _getdtype, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ftrun.errors import CheckpointError, FtrunError
from ftrun.runs.artifacts import MANIFEST, is_whole, whole_folder, write_json
from ftrun.training.distributed import Team
from ftrun.training.parts import Attached

FORMAT = 1  # of a checkpoint; raise it when another version could not read what this one writes, or would misread it
SAME_COMMAND = "Resume with the command that started the run."
SAME_VERSION = (
    "Resume with the version of ftrun that started the run (its lock.json or ftrun.log says which), or start a new run."
)


@dataclass
class Progress:
    """How far a run is. Everything random follows from seed and step, so no generator needs saving."""

    step: int = 0  # optimiser steps done
    tokens: int = 0  # tokens seen, padding not counted
    trained_tokens: int = 0  # tokens that carried loss
    best_loss: float | None = None
    best_step: int | None = None
    last_loss: float | None = None
    data: str = ""  # fingerprint of the token table
    model: str = ""  # fingerprint of the base weights and the tokenizer


def save(
    folder: Path,
    progress: Progress,
    parameters: dict[str, nn.Parameter],
    optimizer: Optimizer,
    adapter: Attached,
    team: Team,
) -> Path:
    """Write checkpoints/step-000100 below ``folder``: process 0 does, or all where each holds a slice of the weights.

    A tensor has the same name either way: any number of processes can `load` what any other number has saved.
    """
    path = folder / f"step-{progress.step:06d}"
    tensors: dict[str, dict[str, Tensor]] = {"trainable": {name: p.detach() for name, p in parameters.items()}}
    plain: dict[str, Any] = {}
    for name, tree in {"optimizer": optimizer.state_dict(), "adapter_state": adapter.state_dict()}.items():
        tensors[name] = {}
        plain[name] = _strip(tree, "", tensors[name])
    if any(isinstance(p, DTensor) for p in parameters.values()):
        _save_slices(path, tensors, plain, progress, team)
        return path
    with whole_folder(path) as beside:
        for name, those in tensors.items():
            save_file({at: t.cpu().contiguous().clone() for at, t in those.items()}, beside / f"{name}.safetensors")
        _write_plain(beside, plain, progress)
    return path


def _save_slices(
    path: Path, tensors: dict[str, dict[str, Tensor]], plain: dict[str, Any], progress: Progress, team: Team
) -> None:
    """Every process writes its slices into the folder of process 0, which seals it when all have."""
    with whole_folder(path) if team.is_main else contextlib.nullcontext() as made:
        beside = Path(team.gather_object(str(made))[0])
        for name, those in tensors.items():
            if those:
                save_distributed(
                    those, storage_writer=HuggingFaceStorageWriter(str(beside / name), save_distributed=True)
                )
        team.barrier()
        if team.is_main:
            _write_plain(beside, plain, progress)
    team.barrier()


def _write_plain(folder: Path, plain: dict[str, Any], progress: Progress) -> None:
    for name, tree in plain.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))
    write_json(folder / "progress.json", {"format": FORMAT} | asdict(progress))


def load(path: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer, adapter: Attached) -> Progress:
    """Restore what ``save`` wrote, by however many processes. Raises CheckpointError when it does not fit this run."""
    progress = progress_of(path)
    with _readable(path):
        _check_parameters(path, parameters)
        _fill(path, "trainable", {name: parameter.detach() for name, parameter in parameters.items()})
        numbered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.load_state_dict(_load_tree(path, "optimizer", numbered))
        _check_taken(path, "optimizer", optimizer.state_dict())
        adapter.load_state_dict(_load_tree(path, "adapter_state", []))
    return progress


def progress_of(path: Path) -> Progress:
    """How far the run was when it wrote this checkpoint. Raises CheckpointError for a checkpoint of another format."""
    file = path / "progress.json"
    with _readable(file):
        said = {"model": ""} | json.loads(file.read_text())  # older ones do not name it
        written = said.pop("format", FORMAT)
        if written != FORMAT:
            raise CheckpointError(
                f"{path.name} has checkpoint format {written}, and this version reads {FORMAT}", str(file), SAME_VERSION
            )
        return Progress(**{field.name: said.pop(field.name) for field in fields(Progress)}, **said)


def _check_parameters(path: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Refuse saved weights that are not those of this run by name, shape and type: a cast would round them."""
    saved = _described(path, "trainable")
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())[:3]
        raise CheckpointError(
            "the checkpoint trains other parameters than this run", f"{path}: {', '.join(odd)}", SAME_COMMAND
        )
    for name, parameter in parameters.items():
        shape, dtype = saved[name]
        if shape != parameter.shape:
            raise CheckpointError(f"{name} has another shape in the checkpoint", str(path), SAME_COMMAND)
        if dtype != parameter.dtype:
            raise CheckpointError(
                f"{name} is {dtype} in the checkpoint and {parameter.dtype} in this run", str(path), SAME_COMMAND
            )


def _check_taken(path: Path, name: str, tree: dict[str, Any]) -> None:
    """Refuse saved state that its new owner has left out, or holds in another shape or type than it was saved in."""
    taken: dict[str, Tensor] = {}
    _strip(tree, "", taken)
    now = {at: (tensor.shape, tensor.dtype) for at, tensor in taken.items()}
    saved = _described(path, name)
    odd = sorted(at for at in now.keys() | saved.keys() if now.get(at) != saved.get(at))
    if odd:
        raise CheckpointError(
            f"the {name}'s state does not fit this run: {', '.join(odd[:3])}", str(path), SAME_VERSION
        )


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What is whole and yet cannot be read was written by another version. Raises CheckpointError."""
    try:
        yield
    except FtrunError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, SafetensorError) as error:
        if "allocate memory" in str(error):
            raise
        raise CheckpointError(
            f"this version cannot read {path.name}: {type(error).__name__}: {error}", str(path), SAME_VERSION
        ) from error


def _described(path: Path, name: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and types of the tensors that ``name`` is made of, in one file or in slices."""
    file = path / f"{name}.safetensors"
    if file.exists():
        with safe_open(file, framework="pt") as opened:
            return {
                key: (torch.Size(part.get_shape()), _getdtype(part.get_dtype()))
                for key in opened.keys()  # noqa: SIM118
                for part in [opened.get_slice(key)]
            }
    if not (path / name).is_dir():
        return {}
    found = HuggingFaceStorageReader(str(path / name)).read_metadata().state_dict_metadata
    return {key: (item.size, item.properties.dtype) for key, item in found.items()}  # type: ignore[union-attr]


@torch.no_grad()
def _fill(path: Path, name: str, into: dict[str, Tensor]) -> None:
    """Read saved values into these tensors, in place; a process that holds slices reads its slices."""
    file = path / f"{name}.safetensors"
    if file.exists():
        with safe_open(file, framework="pt") as opened:
            for key, tensor in into.items():
                whole = opened.get_tensor(key)
                if isinstance(tensor, DTensor):
                    mesh, placements = tensor.device_mesh, tensor.placements
                    whole = distribute_tensor(whole.to(tensor.device), mesh, placements, src_data_rank=None)
                tensor.copy_(whole)
    elif into:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load_distributed(dict(into), storage_reader=HuggingFaceStorageReader(str(path / name)), no_dist=True)


def newest_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest complete checkpoint below ``folder``, and the damaged ones that were passed over."""
    damaged = []
    for path in _newest_first(folder):
        if is_whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def _newest_first(folder: Path) -> list[Path]:
    """Checkpoints by their step; a copy that somebody has made beside them is none."""
    steps = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdigit()}
    return [steps[step] for step in sorted(steps, reverse=True)]


def sweep(folder: Path) -> None:
    """Delete what killed runs left half-written."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def prune(folder: Path, keep: int, spare: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints; the one of step ``spare`` stays."""
    for path in _newest_first(folder)[keep:]:
        if spare is None or path.name != f"step-{spare:06d}":
            (path / MANIFEST).unlink(missing_ok=True)  # what is half deleted must not look whole
            shutil.rmtree(path)


def _strip(node: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of dicts, lists, tensors and plain values as JSON; its tensors go to ``tensors``."""
    if isinstance(node, Tensor):
        tensors[at] = node.detach()
        return {"__tensor__": at}
    if isinstance(node, dict):
        return {"__dict__": [[key, _strip(item, f"{at}/{key}", tensors)] for key, item in node.items()]}
    if isinstance(node, (list, tuple)):
        items = [_strip(item, f"{at}/{i}", tensors) for i, item in enumerate(node)]
        return {"__list__": items, "tuple": isinstance(node, tuple)}
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"cannot save a {type(node).__name__} in a checkpoint (at {at})")


def _load_tree(path: Path, name: str, parameters: list[nn.Parameter]) -> Any:
    """What `_strip` took apart; the state of a parameter of the same shape is sliced as the parameter is."""
    tensors: dict[str, Tensor] = {}
    for at, (shape, dtype) in _described(path, name).items():
        owner = at.split("/")[2] if at.startswith("/state/") else ""
        like = parameters[int(owner)] if owner.isdigit() and int(owner) < len(parameters) else None
        if isinstance(like, DTensor) and like.shape == shape:
            tensors[at] = torch.zeros_like(like, dtype=dtype)
        else:
            tensors[at] = torch.zeros(shape, dtype=dtype)
    _fill(path, name, tensors)

    def build(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "__tensor__" in node:
            return tensors[node["__tensor__"]]
        if "__dict__" in node:
            return {key: build(item) for key, item in node["__dict__"]}
        items = [build(item) for item in node["__list__"]]
        return tuple(items) if node["tuple"] else items

    return build(json.loads((path / f"{name}.json").read_text()))
