"""Which keys a verb reads. What it would ignore is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hydra.core.override_parser.types import Override

from ftrun.config.explain import parse
from ftrun.errors import ConfigError


@dataclass(frozen=True)
class Reads:
    """The keys that a verb reads (a section stands for all below it), and those that it refuses with a word of its own."""

    keys: tuple[str, ...] | None = None  # None: every key of the config
    refused: dict[str, str] = field(default_factory=dict)  # key or section -> what to do instead

    def refusal(self, key: str) -> str | None:
        """What to do instead of naming ``key``; None where it is read."""
        for other, todo in self.refused.items():
            if _below(key, other):
                return todo
        if self.keys is None or any(_below(key, other) for other in self.keys):
            return None
        return f"It reads {', '.join(self.keys)}."


MACHINE = ("launch.device", "launch.threads")
LOADING = ("model.dtype", "model.attention", "model.template", "model.trust_remote_code", "quant")
NO_CLUSTER = {"cluster": "Only `ftrun submit` asks a cluster: ftrun submit train ..."}
NO_PROMPT = {"prompt": "Only `ftrun generate` answers a prompt."} | NO_CLUSTER
OWN_SPLIT = "Which rows the run held out follows from it. Name other rows with data.path=FILE, or fewer with data.heldout_limit=N."

ON_RUN = {
    "eval": Reads(
        ("run", "out", "eval", "data", "tokens", *LOADING, *MACHINE),
        {
            "recipe": "A run has its recipe: leave recipe= out.",
            "model.path": "run= names the model: its adapter on its base. Leave one of the two out.",
            "seed": OWN_SPLIT,
            "data.heldout": OWN_SPLIT,
            **NO_CLUSTER,
        },
    ),
    "generate": Reads(("run", "prompt", "data.system", "tokens", *LOADING, *MACHINE), NO_CLUSTER),
    "merge": Reads(("run", "out", "model.dtype", *MACHINE), NO_CLUSTER),
}
ON_MODEL = {
    "eval": Reads(
        ("model", "recipe", "task", "data", "tokens", "eval", "quant", "seed", "out", *MACHINE),
        {"data.heldout": "All rows of data.path are evaluated, at most data.heldout_limit of them."} | NO_CLUSTER,
    ),
    "generate": Reads(("model", "recipe", "prompt", "data.system", "tokens", "quant", *MACHINE), NO_CLUSTER),
    "merge": ON_RUN["merge"],
    "train": Reads(None, NO_PROMPT),
    "select": Reads(
        None, NO_PROMPT | {"run": "To score with the model of a run, merge it and give model.path=RUN/model."}
    ),
    "plan": Reads(None, NO_PROMPT | {"resume": "A plan tells of a new run: leave resume= out."}),
    "preview": Reads(None, NO_PROMPT | {"resume": "A preview tells of a new run: leave resume= out."}),
}


def read(overrides: Sequence[str]) -> list[Override]:
    """Hydra's reading of an override each. Not of which recipe: a file of any name may be one."""
    return parse(["recipe=one" if word.startswith("recipe=") else word for word in overrides])


def named(overrides: Sequence[str]) -> set[str]:
    """The keys that a command line names. Raises ConfigError for an override that cannot be read."""
    found = (override.key_or_group.replace("/", ".") for override in read(overrides))
    return {key for key in found if key.partition(".")[0] != "hydra"}


def names(keys: Iterable[str], *sections: str) -> bool:
    """Whether one of ``keys`` is one of these, or lies below one."""
    return any(_below(key, section) for key in keys for section in sections)


def check_read(verb: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for a key that ``verb`` would ignore."""
    keys = named(overrides)
    on_run = verb in ON_RUN and "run" in keys
    reads = (ON_RUN if on_run else ON_MODEL).get(verb)
    if reads is None:
        return
    for override in read(overrides):
        key = override.key_or_group.replace("/", ".")
        todo = reads.refusal(key) if key in keys else None
        if todo is not None:
            beside = " with run=" if on_run and verb != "merge" else ""
            raise ConfigError(f"ftrun {verb}{beside} does not read {key}", str(override.input_line), todo)


def _below(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")
