"""Checkpoints: whole or not at all, safetensors and JSON only, and the newest whole one is the one to resume from.

Where each process holds a slice of the weights they are torch's distributed checkpoints, each slice a safetensors file.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed
from safetensors import safe_open
from safetensors.torch import _getdtype, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ftrun.errors import CheckpointError
from ftrun.runs.artifacts import MANIFEST, is_whole, whole_folder, write_json
from ftrun.training.distributed import Team
from ftrun.training.parts import Attached


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
                distributed.save(
                    those, storage_writer=HuggingFaceStorageWriter(str(beside / name), save_distributed=True)
                )
        team.barrier()
        if team.is_main:
            _write_plain(beside, plain, progress)
    team.barrier()


def _write_plain(folder: Path, plain: dict[str, Any], progress: Progress) -> None:
    for name, tree in plain.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))
    write_json(folder / "progress.json", asdict(progress))


def load(path: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer, adapter: Attached) -> Progress:
    """Restore what ``save`` wrote, by however many processes. Raises CheckpointError when it does not fit this run."""
    saved = _described(path, "trainable")
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())[:3]
        raise CheckpointError(
            "the checkpoint trains other parameters than this run",
            f"{path}: {', '.join(odd)}",
            "Resume with the command that started the run.",
        )
    for name, parameter in parameters.items():
        if saved[name][0] != parameter.shape:
            raise CheckpointError(
                f"{name} has another shape in the checkpoint",
                str(path),
                "Resume with the command that started the run.",
            )
    _fill(path, "trainable", {name: parameter.detach() for name, parameter in parameters.items()})
    numbered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.load_state_dict(_load_tree(path, "optimizer", numbered))
    adapter.load_state_dict(_load_tree(path, "adapter_state", []))
    return progress_of(path)


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
            distributed.load(dict(into), storage_reader=HuggingFaceStorageReader(str(path / name)), no_dist=True)


def progress_of(path: Path) -> Progress:
    """How far the run was when it wrote this checkpoint."""
    return Progress(**json.loads((path / "progress.json").read_text()))


def newest_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest complete checkpoint below ``folder``, and the damaged ones that were passed over."""
    damaged = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        if is_whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def sweep(folder: Path) -> None:
    """Delete what killed runs left half-written."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def prune(folder: Path, keep: int, spare: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints; the one of step ``spare`` stays."""
    for path in sorted(folder.glob("step-*"), reverse=True)[keep:]:
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
