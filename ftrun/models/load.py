"""Loading: config, tokenizer and weights of whatever ``model.path`` names."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ftrun.config.settings import ModelConfig
from ftrun.errors import ConfigError
from ftrun.models import varlen
from ftrun.models.architecture import describe
from ftrun.models.bundle import Bundle
from ftrun.models.fast import speed_up
from ftrun.models.fingerprint import folder_fingerprint
from ftrun.models.quiet import without_bars
from ftrun.models.source import model_folder, origin, weight_files
from ftrun.quant.base import Quant, keep_unpacked
from ftrun.runs.memory import memory_guard

Task = Literal["causal", "classify"]
log = logging.getLogger("ftrun")


def load_bundle(
    model: ModelConfig,
    *,
    task: Task,
    quant: Quant | None = None,
    device: torch.device | None = None,
    labels: int | None = None,
) -> Bundle:
    """The model in eval mode on ``device`` (default: CPU), its tokenizer and architecture.

    Raises ConfigError for files that are missing or do not belong together, ResourceError without enough memory.
    """
    folder = model_folder(model)
    device = device or torch.device("cpu")
    dtype = resolve_dtype(model.dtype, device)
    config = _config(folder, model, labels)
    tokenizer = _tokenizer(folder, model)
    if task == "classify" and config.get_text_config().pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id or 0  # decoders classify at the last token that is not padding
    arguments: dict[str, Any] = (quant or Quant()).load_arguments(dtype)
    if "quantization_config" in arguments or device.type != "cpu":
        arguments["device_map"] = {"": device}
    with (
        memory_guard(f"loading {model.path}", "Use quant=nf4, model.dtype=bfloat16, or a smaller model."),
        _quiet(),
        _whole_weights(folder),
    ):
        loaded, report = _auto_class(task).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention_for(config, model.attention, device),
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **arguments,
        )
    # what saved files say of their base; ``loaded.name_or_path`` stays the folder, to read it again
    loaded.config._name_or_path, loaded.config._commit_hash = origin(model, folder)
    architecture = describe(loaded)
    _check_weights(report["missing_keys"], loaded, architecture.backbone, task, folder)
    _check_vocabulary(tokenizer, architecture.vocabulary, folder)
    keep_unpacked(loaded)
    speed_up(loaded)
    return Bundle(
        model=loaded.eval(),
        tokenizer=tokenizer,
        architecture=architecture,
        device=device,
        dtype=dtype,
        path=model.path,
        fingerprint=folder_fingerprint(folder),
        context_length=architecture.context_length,
    )


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer alone, without the weights."""
    return _tokenizer(model_folder(model, weights=False), model)


def load_config(model: ModelConfig) -> Any:
    """The transformers config alone."""
    return _config(model_folder(model, weights=False), model, None)


def meta_model(model: ModelConfig, task: Task, labels: int | None = None) -> nn.Module:
    """The model's shape on the meta device: every parameter, and no memory."""
    config = _config(model_folder(model, weights=False), model, labels)
    with torch.device("meta"):
        return _auto_class(task).from_config(config, trust_remote_code=model.trust_remote_code)


def parameters_in(model: ModelConfig) -> int:
    """Parameters in the model's files, from their headers alone."""
    folder, total = model_folder(model), 0
    with _whole_weights(folder):
        for file in weight_files(folder):
            with safe_open(file, "pt") as tensors:
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def fingerprint(model: ModelConfig) -> str:
    """Hash of the weights, config and tokenizer that ``model`` names."""
    return folder_fingerprint(model_folder(model))


def resolved(model: ModelConfig, device: torch.device) -> dict[str, Any]:
    """What ``model`` computes with on ``device``: for keys of what is kept, and independent of where its files lie."""
    return {
        "fingerprint": fingerprint(model),
        "dtype": str(resolve_dtype(model.dtype, device)),
        "attention": attention_for(load_config(model), model.attention, device),
        "device": device.type,
    }


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on every CPU, so that numbers agree between machines; bfloat16 on a GPU that computes in it."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.float32


def attention_for(config: Any, wanted: str, device: torch.device) -> str:
    """The attention implementation to use for ``model.attention``.

    sdpa cannot cap attention scores as Gemma 2 does: eager then. On a CPU sdpa gets its form for packed documents.
    """
    if wanted == "sdpa" and getattr(config.get_text_config(), "attn_logit_softcapping", None):
        _say(f"attention: eager, since sdpa cannot cap attention scores as {config.model_type} does")
        return "eager"
    return varlen.NAME if wanted == "sdpa" and device.type == "cpu" else wanted


@functools.cache
def _say(text: str) -> None:
    """Once a process, however often a tokenizer or model is loaded."""
    log.warning(text)


def _auto_class(task: Task) -> Any:
    return AutoModelForSequenceClassification if task == "classify" else AutoModelForCausalLM


def _config(folder: Path, model: ModelConfig, labels: int | None) -> Any:
    shape = {} if labels is None else {"num_labels": labels}
    try:
        return AutoConfig.from_pretrained(
            folder, trust_remote_code=model.trust_remote_code, local_files_only=True, **shape
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise _unreadable(f"the config in {folder}", error, model) from error


def _tokenizer(folder: Path, model: ModelConfig) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise _unreadable(f"the tokenizer in {folder}", error, model) from error
    if tokenizer.pad_token is None:
        _choose_padding(tokenizer)
    return tokenizer


def _choose_padding(tokenizer: Any) -> None:
    """Padding from the special tokens that mean nothing in a text; never the end of a text, never an ordinary word."""
    meaningful = {tokenizer.eos_token, tokenizer.bos_token}
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = [token for token in special if token not in meaningful]
    named_pad = [token for token in special if "pad" in token.lower()]
    unknown = [tokenizer.unk_token] if tokenizer.unk_token and tokenizer.unk_token not in meaningful else []
    choice = next(iter([*named_pad, *unknown]), None)
    if choice is None:
        _say("padding: the tokenizer has no token for it; batches are filled with id 0, which nothing attends to")
        return
    tokenizer.pad_token = choice
    _say(f"padding: the tokenizer has no token for it; batches are filled with {choice}")


def _unreadable(what: str, error: Exception, model: ModelConfig) -> ConfigError:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text and not model.trust_remote_code:
        return ConfigError(
            f"{model.path} brings its own code",
            f"model.path={model.path}",
            "Read that code; if you trust it, set model.trust_remote_code=true.",
        )
    return ConfigError(
        f"{what} cannot be read: {text[:300]}", f"model.path={model.path}", "Copy or download the model again."
    )


def _check_weights(missing: Any, model: nn.Module, backbone: str, task: Task, folder: Path) -> None:
    """Weights that the files lack would be random; only a new classifier may start like that."""
    lost = sorted(name for name in missing if task == "causal" or name.startswith(backbone + "."))
    lost = [name for name in lost if ".pooler." not in name]  # sentence encoders are saved without it
    if lost:
        raise ConfigError(
            f"the weight files lack {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""),
            f"model.path={folder}",
            f"They do not belong to this config ({type(model).__name__}).",
        )


def _check_vocabulary(tokenizer: Any, rows: int, folder: Path) -> None:
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise ConfigError(
            f"vocabulary mismatch: the tokenizer has ids up to {highest} ({token}), the model embeds {rows}",
            f"model.path={folder}",
            "Use the tokenizer that the model was trained with, or enlarge the model's embedding.",
        )


@contextmanager
def _whole_weights(folder: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        if "allocate memory" in str(error):
            raise
        raise ConfigError(
            f"a weight file is damaged: {error}", f"model.path={folder}", "Copy or download the model again."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars or tables of transformers: what they would tell is checked, and an error here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        transformers_logging.set_verbosity(level)
