"""Where a model's files are: a folder, a GGUF file, a built-in model, or the hub."""

from __future__ import annotations

import difflib
import json
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from ftrun.config.settings import ModelConfig
from ftrun.errors import ConfigError
from ftrun.models.demo import builtin
from ftrun.models.gguf import converted

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def model_folder(model: ModelConfig, weights: bool = True) -> Path:
    """The local folder that holds the model; a hub id is fetched into the hub's cache first.

    ``weights=False`` settles for config and tokenizer. Raises ConfigError with the missing file or the nearest name.
    """
    path = model.path
    if path.startswith("builtin:"):
        return builtin(path.removeprefix("builtin:"))
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        if not local.is_file():
            raise _missing(local, "file")
        return converted(local)
    if local.is_dir():
        run = not (local / "config.json").is_file() and (local / "config.yaml").is_file()
        folder = local / "model" if run and (local / "model").is_dir() else local
        _check_folder(folder, weights)
        return folder
    if local.is_file():
        raise ConfigError(
            f"{path} is a file", "model.path", "Name the folder that holds it, a .gguf file, or a hub id."
        )
    if _means_a_folder(path):
        raise _missing(local, "folder")
    folder = _from_hub(model, weights)
    _check_folder(folder, weights)
    return folder


def origin(model: ModelConfig, folder: Path) -> tuple[str, str | None]:
    """Name and revision by which others find the model that was found in ``folder``; no path into a cache.

    A hub id comes with the commit that was loaded, where the hub's cache tells; a path is the user's own, made absolute.
    """
    if model.path.startswith("builtin:"):
        return model.path, None
    local = Path(model.path).expanduser()
    if local.exists():
        return os.path.abspath(local), None
    return model.path, folder.name if folder.parent.name == "snapshots" else model.revision


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model, shards in order."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in _names_in(index)]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def _names_in(index: Path) -> list[str]:
    """The weight files that an index names. Raises ConfigError for one outside of the folder, or that is no safetensors."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{index.name} names no weight files", str(index), "Copy or download the model again."
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            what = f"{index.name} names a file outside of its folder, or no safetensors: {name!r}"
            raise ConfigError(what, str(index), "Get the model from another source.")
    return names


def safe_adapter(folder: Path) -> Path:
    """The folder of an adapter whose weights are no pickle. Raises ConfigError."""
    if not (folder / "adapter_model.safetensors").is_file():
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        why = f"{pickles[0].name} is a pickle, which can run code: save it again with safetensors" if pickles else ""
        raise ConfigError(f"{folder} has no adapter_model.safetensors", str(folder), why or "Copy it again.")
    return folder


def tokenizer_files(folder: Path) -> list[Path]:
    """Config, tokenizer and template files: what beside the weights decides what the model computes."""
    names = {*TOKENIZER_FILES, "config.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    names |= {"added_tokens.json", "chat_template.jinja", "chat_template.json"}
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def _means_a_folder(path: str) -> bool:
    """A hub id is NAME or OWNER/NAME; anything else, or a name below a folder that exists, was meant to be local."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())


def _missing(local: Path, kind: str) -> ConfigError:
    where = f"model.path={local}"
    if not local.parent.is_dir():
        return ConfigError(f"there is no {kind} {local}", where, f"There is no folder {local.parent} either.")
    names = [
        entry.name
        for entry in local.parent.iterdir()
        if (entry.suffix == ".gguf" if kind == "file" else entry.is_dir())
    ]
    close = difflib.get_close_matches(local.name, names, n=1, cutoff=0.5)
    return ConfigError(
        f"there is no {kind} {local}", where, f'Did you mean "{local.parent / close[0]}"?' if close else ""
    )


def _check_folder(folder: Path, weights: bool) -> None:
    where = f"model.path={folder}"
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise _adapter_alone(folder, where)
        if (folder / "config.yaml").is_file():
            raise _run_without_model(folder, where)
        ggufs = sorted(folder.glob("*.gguf"))
        hint = (
            f"Use model.path={ggufs[0]}."
            if ggufs
            else "A transformers folder has config.json, tokenizer and safetensors."
        )
        raise ConfigError(f"{folder} has no config.json", where, hint)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES[:4])})", where, "Copy the tokenizer's files there."
        )
    if not weights:
        return
    files = weight_files(folder)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ConfigError(
            f"{folder} is incomplete: {absent[0]} is missing ({len(absent)} of {len(files)} files)", where
        )
    if not files:
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        hint = (
            f"{pickles[0].name} is a pickle, which can run code; save the model again with safetensors."
            if pickles
            else ""
        )
        raise ConfigError(f"{folder} has no model.safetensors", where, hint)


def _run_without_model(run: Path, where: str) -> ConfigError:
    if not (run / "adapter").is_dir():
        return ConfigError(f"{run} is a run that has saved no model", where, f"Finish it: ftrun train resume={run}.")
    return ConfigError(
        f"{run} is a run that has trained an adapter, not a model",
        where,
        f"Use run={run} with eval, generate and train, or merge it, ftrun merge run={run}, and give {run / 'model'}.",
    )


def _adapter_alone(folder: Path, where: str) -> ConfigError:
    """An adapter of ours belongs to a run; any other one must be merged by whoever made it."""
    what = f"{folder} holds an adapter, not a model"
    if (folder.parent / "config.yaml").is_file():
        return ConfigError(what, where, _run_without_model(folder.parent, where).todo)
    base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    return ConfigError(
        what,
        where,
        f"Merge it into its base {base} with peft (merge_and_unload, save_pretrained, and the tokenizer), and name that folder.",
    )


def _from_hub(model: ModelConfig, weights: bool) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    patterns = SIDE_FILES + (["*.safetensors"] if weights else []) + (["*.py"] if model.trust_remote_code else [])
    where = f"model.path={model.path}"
    offline = not _hub_answers()
    try:
        return Path(
            snapshot_download(
                model.path,
                revision=model.revision,
                local_files_only=offline,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],  # copies of the weights in other layouts
            )
        )
    except hub.HFValidationError as error:
        raise ConfigError(f'"{model.path}" is neither a folder nor a hub id', where) from error
    except hub.GatedRepoError as error:
        raise ConfigError(
            f"{model.path} asks for its licence to be accepted",
            where,
            "Accept it on the hub and log in with `hf auth login`.",
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ConfigError(
            f"{model.path} has no revision {model.revision}", f"model.revision={model.revision}"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ConfigError(f"the hub has no model {model.path}, and there is no such folder", where) from error
    except (hub.LocalEntryNotFoundError, hub.HfHubHTTPError) as error:
        raise ConfigError(
            f"{model.path} is not on this machine, and the hub cannot be reached",
            where,
            "Name a local folder, or use model.path=builtin:smollm2_135m, which needs no network.",
        ) from error


def _hub_answers(seconds: float = 3.0) -> bool:
    """Whether the hub answers at once; its own client would retry for minutes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError:
        return True  # an answer, though no page
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # it answered; the hub's client may know its certificate
    except OSError:
        return False
    return True
