"""Checkpoints: whole or not at all, safetensors and JSON only, and the newest whole one is the one to resume from."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ftrun.errors import CheckpointError
from ftrun.runs.artifacts import MANIFEST, is_whole, whole_folder, write_json
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
    folder: Path, progress: Progress, parameters: dict[str, nn.Parameter], optimizer: Optimizer, adapter: Attached
) -> Path:
    """Write checkpoints/step-000100 below ``folder``."""
    path = folder / f"step-{progress.step:06d}"
    with whole_folder(path) as beside:
        save_file(
            {name: p.detach().contiguous().clone() for name, p in parameters.items()}, beside / "trainable.safetensors"
        )
        _save_tree(optimizer.state_dict(), beside, "optimizer")
        _save_tree(adapter.state_dict(), beside, "adapter_state")
        write_json(beside / "progress.json", asdict(progress))
    return path


def load(path: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer, adapter: Attached) -> Progress:
    """Restore what ``save`` wrote. Raises CheckpointError when it does not fit this run."""
    saved = load_file(path / "trainable.safetensors")
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())[:3]
        raise CheckpointError(
            "the checkpoint trains other parameters than this run",
            f"{path}: {', '.join(odd)}",
            "Resume with the command that started the run.",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if saved[name].shape != parameter.shape:
                raise CheckpointError(
                    f"{name} has another shape in the checkpoint",
                    str(path),
                    "Resume with the command that started the run.",
                )
            parameter.copy_(saved[name])
    optimizer.load_state_dict(_load_tree(path, "optimizer"))
    adapter.load_state_dict(_load_tree(path, "adapter_state"))
    return progress_of(path)


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


def _save_tree(tree: dict[str, Any], folder: Path, name: str) -> None:
    """Nested dicts and lists of tensors and plain values as one safetensors and one JSON file."""
    tensors: dict[str, Tensor] = {}

    def strip(node: Any, at: str) -> Any:
        if isinstance(node, Tensor):
            tensors[at] = node.detach().cpu().contiguous().clone()
            return {"__tensor__": at}
        if isinstance(node, dict):
            return {"__dict__": [[key, strip(item, f"{at}/{key}")] for key, item in node.items()]}
        if isinstance(node, (list, tuple)):
            return {
                "__list__": [strip(item, f"{at}/{i}") for i, item in enumerate(node)],
                "tuple": isinstance(node, tuple),
            }
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"cannot save a {type(node).__name__} in a checkpoint (at {at})")

    (folder / f"{name}.json").write_text(json.dumps(strip(tree, "")))
    save_file(tensors, folder / f"{name}.safetensors")


def _load_tree(folder: Path, name: str) -> Any:
    tensors = load_file(folder / f"{name}.safetensors")

    def build(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "__tensor__" in node:
            return tensors[node["__tensor__"]]
        if "__dict__" in node:
            return {key: build(item) for key, item in node["__dict__"]}
        items = [build(item) for item in node["__list__"]]
        return tuple(items) if node["tuple"] else items

    return build(json.loads((folder / f"{name}.json").read_text()))
