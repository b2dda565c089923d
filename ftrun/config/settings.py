"""The sections of a config that are not components, and the resolved whole.

Field comments are the help that ``ftrun show`` prints. Imports nothing heavy.
"""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from ftrun import registry


@dataclass
class ModelConfig:
    path: str = "builtin:smollm2_135m"  # folder, hub id, .gguf file, or builtin:NAME
    revision: str | None = None  # branch, tag or commit on the hub
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on any CPU, bfloat16 on a GPU
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"  # attention implementation
    template: str | None = None  # chat template: a jinja file, or the name of a built-in one (chatml, alpaca, plain)
    trust_remote_code: bool = False  # run code that a hub repository carries; never on by itself


@dataclass
class DataConfig:
    path: str | list[str] = "builtin:gsm_symbolic:1000"  # file, folder, glob, hub id, builtin:NAME:ROWS, or a list
    format: Literal[
        "auto",
        "alpaca",
        "prompt_completion",
        "messages",
        "sharegpt",
        "text",
        "preference",
        "binary",
        "prompts",
        "classification",
    ] = "auto"  # layout of the rows
    columns: dict[str, str] = field(default_factory=dict)  # rename columns: {instruction: question, output: answer}
    ignore: list[str] = field(default_factory=list)  # columns that mean nothing here: [tools, weight]
    weights: list[float] | None = None  # one a source of a mixture; rows are repeated or left out
    split: str = "train"  # split of a hub data set, or of a folder or file that has splits
    heldout: float = 0.05  # share of rows kept for evaluation, by content hash, at least one; 0: none
    heldout_path: str | None = None  # evaluate on these rows instead of a held-out share
    heldout_limit: int = 200  # at most this many held-out rows are evaluated
    limit: int | None = None  # use only the first rows of the source
    max_length: int | None = None  # longest row, in tokens; null: what the model can attend to, at most 2048
    unfit: Literal["error", "drop"] = (
        "error"  # rows that cannot be trained, an empty answer for one: refuse, or leave out
    )
    overlong: Literal["auto", "error", "drop", "truncate"] = "auto"  # auto: split texts; drop others, error above 1%
    train_on: Literal["responses", "last_response", "all"] = "responses"  # which tokens carry loss in a conversation
    system: str | None = None  # system prompt for rows that have none


@dataclass
class TrainConfig:
    max_steps: int | None = None  # optimiser steps; null: epochs decide
    epochs: float = 1.0  # passes over the training rows
    batch_size: int = 8  # rows per optimiser step, over all processes
    batch_tokens: int | None = (
        None  # upper bound of the tokens in one micro-batch, padding included; null: 1024 on a CPU, 4096 on a GPU
    )
    packing: bool | None = (
        None  # join rows into full sequences, each attending only to itself; null: where that costs nothing
    )
    max_grad_norm: float | None = 1.0  # clip the gradient norm; null: no clipping
    pure_bfloat16: bool = False  # what trains is bfloat16 too, not float32: less memory, and small updates are lost
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    log_steps: int = 1  # steps between two lines of metrics.jsonl
    save_steps: int | None = None  # steps between two checkpoints; null: only at the end and when stopped
    keep_checkpoints: int = 2  # whole checkpoints to keep
    eval_steps: int | None = None  # steps between two held-out losses; null: only before and after
    eval_before: bool = True  # run the evaluators on the untrained model too
    load_best: bool = False  # end with the checkpoint of the lowest held-out loss (needs save_steps and eval_steps)
    merge: bool = False  # write a merged model/ beside adapter/
    trackers: list[str] = field(default_factory=list)  # tensorboard, wandb, mlflow ... by name, through Accelerate


@dataclass
class FsdpConfig:
    """How a model is sharded."""

    reshard_after_forward: bool = (
        True  # free a layer's gathered weights after its forward pass: less memory, more traffic
    )
    offload: bool = False  # keep shards in the memory of the CPU while they are not at work


@dataclass
class LaunchConfig:
    processes: int = 1  # processes on this machine (one a GPU, or a share of the cores)
    nodes: int = 1  # machines; each is given the same command
    rendezvous: str | None = None  # host:port of one of the machines, where all of them meet
    restarts: int = 0  # times that the processes start again from the newest checkpoint after one of them died
    timeout: float = 30.0  # minutes without progress after which a process is taken to hang, and in which all must meet
    strategy: Literal["auto", "ddp", "fsdp"] = (
        "auto"  # whole copies of the model, or shards of it; auto: ddp where it fits
    )
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    context_parallel: int = 1  # processes that share each row, for rows too long for one
    threads: int | None = None  # CPU threads of each process; null: OMP_NUM_THREADS, or a fair share of the cores
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to run


@dataclass
class SelectConfig:
    """The part of the select section that every scorer shares."""

    model_path: str | None = None  # score with this model instead of the run's own
    batch_tokens: int | None = (
        None  # upper bound of the tokens in one scoring batch; null: 1024 on a CPU, 4096 on a GPU
    )
    queries: list[str] = field(
        default_factory=list
    )  # files of rows like those wanted, one a task: for targeted methods
    unscored: Literal["drop", "keep"] = "drop"  # rows that a scorer cannot score: never picked, or picked last
    dedup: Literal["minhash", "embedding"] | None = None  # leave near-duplicates out, found by words or embeddings
    dedup_threshold: float | None = None  # similarity of duplicates; null: 0.8 (minhash), 0.95 (embedding)


@dataclass
class TokensConfig:
    """The part of the tokens section that every token policy shares."""

    from_run: str | None = None  # run folder whose selection/tokens.parquet gives the static weights


@dataclass
class RootConfig:
    """Keys at the top level of the config."""

    recipe: str | None = None  # recipe to run: a name from `ftrun recipes`, or a file
    paper: dict[str, Any] = field(default_factory=dict)  # where the method comes from
    fidelity: str = ""  # reference-checked, from-paper or reconstruction
    differences: list[str] = field(default_factory=list)  # known departures from the paper or its code
    task: Literal["causal", "classify"] = "causal"  # causal language model, or sequence classification
    budget: int | float | str | None = None  # rows to select: a share (0.05), a count (500), or tokens (1M_tokens)
    seed: int = 0  # seed of everything random
    out: str | None = None  # run folder; null: runs/<recipe>/<time>-<hash>
    resume: str | None = None  # run folder to continue
    stages: list[Literal["select", "train", "eval"]] = field(
        default_factory=lambda: ["select", "train", "eval"]
    )  # stages to run
    run: str | None = None  # run folder to evaluate, merge or try, or to train on from
    prompt: str | None = None  # text for `ftrun generate`


@dataclass
class Settings(RootConfig):
    """A whole resolved config. ``slots`` maps a slot to its choice and knobs; ``eval`` holds the evaluators in order."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    slots: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    eval: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def choice(self, slot: str) -> str:
        return self.slots[slot][0]

    def choices(self, slot: str) -> list[str]:
        """The components of a slot, several where it takes several."""
        return self.choice(slot).split(registry.JOINT)

    @property
    def selects(self) -> bool:
        """Whether the selection stage has anything to do: a scorer, a picker, or near-duplicates to leave out."""
        return (self.choice("select"), self.choice("picker")) != ("none", "own") or self.select.dedup is not None

    def component(self, slot: str) -> Any:
        """Import and create the chosen component of a slot."""
        name, knobs = self.slots[slot]
        return registry.build(slot, name, knobs)

    def evaluators(self) -> list[Any]:
        return [registry.build("eval", name, knobs) for name, knobs in self.eval]

    def as_dict(self) -> dict[str, Any]:
        """The config as nested plain values, laid out as the command line spells its keys."""
        plain = asdict(self)
        slots, evaluators, shared = plain.pop("slots"), plain.pop("eval"), plain.pop("select")
        from_run = plain.pop("tokens")["from_run"]
        for slot, (name, knobs) in slots.items():
            if slot == "picker":
                continue
            plain[slot] = {"name": name, **knobs}
        plain["tokens"]["from"] = from_run
        plain["select"] |= {"model": {"path": shared.pop("model_path")}, **shared}
        picker, knobs = slots["picker"]
        plain["select"]["picker"] = {"name": picker, **knobs}
        plain["eval"] = dict(evaluators)
        return plain


SETTINGS_FILE = Path(__file__)
SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "launch": LaunchConfig}


def section_knobs(section: str) -> dict[str, registry.Knob]:
    """Knobs of model, data, train or launch; those of a section inside it by their dotted names."""
    return registry.read_dataclass(SETTINGS_FILE, SECTIONS[section].__name__)


def section_of(section: str, values: dict[str, Any]) -> Any:
    """The section with these values, keyed as ``section_knobs`` names them."""
    cls, inside = SECTIONS[section], registry.nested(values)
    below = {each.name: each.default_factory for each in fields(cls) if is_dataclass(each.default_factory)}
    return cls(**{name: below[name](**value) if name in below else value for name, value in inside.items()})


def section_values(settings: Settings, section: str) -> dict[str, Any]:
    """The values of a section, keyed as ``section_knobs`` names them."""
    return {name: operator.attrgetter(name)(getattr(settings, section)) for name in section_knobs(section)}


def root_knobs() -> dict[str, registry.Knob]:
    """Knobs at the top level of the config."""
    return registry.read_dataclass(SETTINGS_FILE, "RootConfig")


def shared_tokens_knobs() -> dict[str, registry.Knob]:
    """Knobs of the tokens section that every token policy shares, spelt as below ``tokens.``."""
    return {"from": registry.read_dataclass(SETTINGS_FILE, "TokensConfig")["from_run"]}


def shared_select_knobs() -> dict[str, registry.Knob]:
    """Knobs of the select section that every scorer shares, spelt as below ``select.``."""
    knobs = registry.read_dataclass(SETTINGS_FILE, "SelectConfig")
    return {("model.path" if name == "model_path" else name): knob for name, knob in knobs.items()}
