"""The second model that some token policies compare with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftrun.adapters.peft_adapter import settled_warnings
from ftrun.artifacts import digest, sha256
from ftrun.errors import ConfigError
from ftrun.models.load import load_bundle

if TYPE_CHECKING:
    from ftrun.context import Context
    from ftrun.models.bundle import Bundle


def load_reference(path: str, base: Bundle, ctx: Context) -> Bundle:
    """The model that ``path`` names: a folder, a hub id, or a run folder with model/ or adapter/ in it.

    It is loaded as the run's model was, quantisation included. Raises ConfigError when its tokenizer gives other ids
    than that of ``base``.
    """
    folder = Path(path).expanduser()
    if (folder / "model" / "config.json").is_file():
        reference = _load(str(folder / "model"), ctx)
    elif (folder / "adapter" / "adapter_config.json").is_file():
        reference = _with_adapter(folder / "adapter", ctx)
    elif (folder / "adapter_config.json").is_file():
        reference = _with_adapter(folder, ctx)
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} holds no model",
            f"tokens.reference={path}",
            "Name a folder with config.json, or a finished run with model/ or adapter/ in it.",
        )
    else:
        reference = _load(path, ctx)
    check_same_tokenizer(base, reference)
    return reference


def check_same_tokenizer(base: Bundle, reference: Bundle) -> None:
    """Raise ConfigError where a token of the base means something else, or nothing, to the reference."""
    ours, theirs = base.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    different = sorted((number, token) for token, number in ours.items() if theirs.get(token) != number)
    if different:
        number, token = different[0]
        raise ConfigError(
            f"{reference.path} has another tokenizer than {base.path}: {len(different)} of {len(ours)} tokens differ, the first is {token!r} ({number})",
            todo="Token losses can only be compared over one vocabulary: use a reference that was fine-tuned from this model.",
        )


def _load(path: str, ctx: Context) -> Bundle:
    config = ctx.settings.model
    if path != config.path:
        config = replace(config, path=path, revision=None)
    return load_bundle(config, task="causal", quant=ctx.settings.component("quant"), device=ctx.team.device)


def _with_adapter(folder: Path, ctx: Context) -> Bundle:
    from peft import PeftModel

    named = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    bundle = _load(_base_of_run(folder.parent) or named or ctx.settings.model.path, ctx)
    weights = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    if not weights:
        raise ConfigError(f"{folder} holds no weights", str(folder), "Only safetensors are read.")
    with settled_warnings():
        model = PeftModel.from_pretrained(bundle.model, str(folder))  # type: ignore[arg-type]
    return replace(bundle, model=model.eval(), path=str(folder), fingerprint=digest([bundle.fingerprint, weights]))


def _base_of_run(run: Path) -> str | None:
    """model.path of a run folder's config."""
    from omegaconf import OmegaConf

    file = run / "config.yaml"
    return OmegaConf.load(file).model.path if file.is_file() else None  # type: ignore[union-attr]
