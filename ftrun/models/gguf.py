"""GGUF files, converted once to a safetensors folder: a GGUF loads in half a minute, the folder in a second."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftrun.errors import ConfigError, ResourceError
from ftrun.models.filehashes import unchanged
from ftrun.runs.artifacts import cache_dir, digest, whole_folder
from ftrun.runs.lockfile import version
from ftrun.runs.worklock import WorkLock

CONVERSION = "2"  # raise it when the conversion changes
CONVERTERS = ("transformers", "gguf")  # what reads the weights and the tokenizer
EXACT_BYTES = 2 * 2**30  # larger files are kept in bfloat16, which is below their own rounding


def made_by() -> str:
    """The end of a cached folder's name: which conversion made it, by which versions of the libraries."""
    return f"{CONVERSION}-{digest([version(name) for name in CONVERTERS])[:8]}"


def converted(gguf: Path) -> Path:
    """The cached safetensors folder of a GGUF file, made the first time. Known by path, size and time of change."""
    facts = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:12]
    return convert_once(gguf, cache_dir() / "models" / f"{gguf.stem}-{key}-{made_by()}")


def convert_once(gguf: Path, folder: Path, finish: Callable[[Any, Any], None] | None = None) -> Path:
    """``folder``, filled from ``gguf`` unless it is there and whole; written beside and renamed, by one process at a time.

    ``finish`` may correct model and tokenizer before they are saved. Raises ConfigError where the package gguf is
    missing or cannot read the file, ResourceError when the disk is full.
    """
    if ready(folder):
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("reading a GGUF file needs the package gguf", str(gguf), "pip install gguf")
    with WorkLock(folder.with_name(folder.name + ".lock"), lambda text: print(f"ftrun: {text}", file=sys.stderr)):
        if unchanged(folder):  # another process converted it while this one waited
            return folder
        print(f"ftrun: converting {gguf.name} once, about half a minute ...", file=sys.stderr, flush=True)
        try:
            with whole_folder(folder) as unfinished:
                _convert(gguf, unfinished, finish)
        except ResourceError as error:
            error.todo = "Set FTRUN_CACHE to a larger disk."
            raise
        except OSError as error:
            raise ConfigError(f"{gguf.name} cannot be read: {error}", str(gguf)) from error
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ConfigError(f"transformers cannot read {gguf.name}: {error}", str(gguf)) from error
    return folder


@functools.cache
def ready(folder: Path) -> bool:
    """Whether a converted model is there and whole, looked at once a process. A damaged one is said: it is made again."""
    whole = unchanged(folder)
    if folder.is_dir() and not whole:
        print(f"ftrun: {folder} is damaged: it is made again", file=sys.stderr, flush=True)
    return whole


def _convert(gguf: Path, folder: Path, finish: Callable[[Any, Any], None] | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftrun.models.quiet import without_bars, without_gguf_bar

    dtype = torch.float32 if gguf.stat().st_size <= EXACT_BYTES else torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with without_bars(), without_gguf_bar():
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    # the weights are plain tensors now; these marks would make save_pretrained treat them as quantised
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if finish is not None:
        finish(model, tokenizer)
    with without_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
