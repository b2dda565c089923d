"""The command line: a verb, then Hydra overrides. Imports nothing heavy until a verb needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftrun.errors import ComponentError, ConfigError, FtrunError, nearest

HELP = """ftrun: fine-tune language models, one recipe a published method

  ftrun train    recipe=qlora_sft data.path=my.jsonl model.path=FOLDER    select, attach, train, evaluate
  ftrun select   recipe=superfiltering data.path=pool.jsonl budget=0.1    score rows and keep the best
  ftrun select   recipe=superfiltering,longest,random budget=0.1          several methods side by side on one pool
  ftrun select   explain run=RUN id=17                                    why a row was kept or left out
  ftrun preview  recipe=qlora_sft data.path=my.jsonl                      rows exactly as they are trained
  ftrun plan     recipe=qlora_sft                                         memory and time before the run
  ftrun eval     run=RUN | model.path=FOLDER                              evaluators on a run or a model
  ftrun generate run=RUN prompt="..."                                     try a trained model
  ftrun merge    run=RUN                                                  fold the adapter into plain weights
  ftrun recipes  [PATTERN] [--slot SLOT] [--json]                         what there is
  ftrun show     recipe=NAME                                              paper, differences, every knob
  ftrun doctor   [--json]                                                 what this machine can do

Any key can be set: optim.learning_rate=1e-4 adapter.r=16 train.max_steps=50. A slot swaps a component: adapter=lisa.
  -m         sweep over comma-separated values: ftrun train -m recipe=lora_sft seed=0,1
  --json     print the summary as the last line of standard output
  --html     ftrun preview: write a page instead of printing
  --recipes DIR   look for recipes there too
  --cfg job  print the composed config; all Hydra flags work (--hydra-help)
"""
HYDRA_VERBS = ("train", "select", "eval", "preview", "plan", "generate", "merge", "show")
PLAIN_VERBS = ("recipes", "doctor")
OWN_FLAGS = ("--json", "--html")
FLAGS_WITH_VALUE = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
    "--info",
    "-i",
    "--experimental-rerun",
)


@dataclass
class CommandLine:
    """A command line taken apart."""

    verb: str
    overrides: list[str] = field(default_factory=list)
    hydra_flags: list[str] = field(default_factory=list)
    json: bool = False
    html: bool = False
    rest: list[str] = field(default_factory=list)  # words that are neither (recipes PATTERN)

    @property
    def sweep(self) -> bool:
        return "-m" in self.hydra_flags or "--multirun" in self.hydra_flags


def main() -> None:
    """Entry point of the command ``ftrun``."""
    sys.exit(entry(sys.argv[1:]))


def entry(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code; a user's mistake prints its message, not a traceback."""
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(HELP, end="")
            return 0
        if argv[0] == "--version":
            from ftrun.runs.lockfile import version

            print(f"ftrun {version('ftrun') or 'from a checkout'}")
            return 0
        return dispatch(parse(argv))
    except FtrunError as error:
        return say(error)
    except KeyboardInterrupt:
        print("ftrun: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output has left (ftrun recipes | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return say(unexpected(error))


def say(error: FtrunError) -> int:
    """Print one error the way every error looks, and return its exit code. A process that we started hands it to us."""
    from ftrun.training.launch import leave_error

    if os.environ.get("FTRUN_DEBUG"):
        import traceback

        traceback.print_exception(error)
    echo = error.secondary and os.environ.get("RANK", "0") != "0"
    if not leave_error(error) and not echo:
        print(f"ftrun: {error}", file=sys.stderr)
    return error.exit_code


def unexpected(error: Exception) -> FtrunError:
    """A failure that nobody foresaw, as the one line that it gets without FTRUN_DEBUG."""
    text = " ".join(str(error).split())[:500]
    made = ComponentError(
        f"a component failed: {type(error).__name__}: {text}", todo="Set FTRUN_DEBUG=1 for the traceback."
    )
    made.__cause__ = error
    return made


def parse(argv: Sequence[str]) -> CommandLine:
    """Split argv into verb, overrides and flags, in whatever order they came. Raises ConfigError for an unknown verb."""
    words = list(argv)
    at = next(
        (
            i
            for i, word in enumerate(words)
            if not word.startswith("-") and (i == 0 or words[i - 1] not in (*FLAGS_WITH_VALUE, "--recipes"))
        ),
        None,
    )
    if at is None:
        raise ConfigError("no verb given", " ".join(words), "See `ftrun --help`.")
    line = CommandLine(words.pop(at))
    if line.verb not in (*HYDRA_VERBS, *PLAIN_VERBS):
        raise ConfigError(
            f'there is no verb "{line.verb}"',
            f"ftrun {' '.join(argv)}",
            nearest(line.verb, (*HYDRA_VERBS, *PLAIN_VERBS)),
        )
    while words:
        word = words.pop(0)
        if word == "--recipes":
            if not words:
                raise ConfigError("--recipes takes a folder")
            os.environ["FTRUN_RECIPES"] = os.pathsep.join(
                filter(None, [os.environ.get("FTRUN_RECIPES", ""), words.pop(0)])
            )
        elif word in OWN_FLAGS:
            setattr(line, word.removeprefix("--"), True)
        elif word.startswith("-"):
            line.hydra_flags.append(word)
            if word in FLAGS_WITH_VALUE and words:
                line.hydra_flags.append(words.pop(0))
        elif "=" in word or word.startswith("~"):
            line.overrides.append(normal_override(word))
        else:
            line.rest.append(word)
    return line


TEXT_KEYS = (
    "prompt",
    "out",
    "run",
    "resume",
    "model.path",
    "model.template",
    "data.path",
    "data.heldout_path",
    "data.system",
    "select.model.path",
)
RENAMED = {"select.scorer": "select", "select.picker": "picker", "select/picker": "picker"}


def normal_override(word: str) -> str:
    """The override as Hydra's grammar wants it: select.picker=kmq picks a slot, and free text is quoted."""
    key, _, value = word.partition("=")
    if key in RENAMED:
        return f"{RENAMED[key]}={value}"
    if key in TEXT_KEYS and value and not (key == "data.path" and value.startswith("[")) and value[0] not in "'\"":
        plain = all(letter.isalnum() or letter in "._-/:\\@,*~" for letter in value)
        if not plain or key == "prompt":
            return f"{key}={quote(value)}"
    return word


def quote(text: str) -> str:
    """Free text as a quoted string of Hydra's grammar; ``${`` is no interpolation."""
    return "'" + text.replace("${", "\\${").replace("\\'", "\\\\'").replace("'", "\\'") + "'"


def dispatch(line: CommandLine) -> int:
    """Hand the command line to its verb."""
    if line.verb in PLAIN_VERBS:
        return _plain_verb(line)
    if "--help" in line.hydra_flags or "-h" in line.hydra_flags:
        print(HELP, end="")
        return 0
    if line.verb == "select" and line.rest == ["explain"]:
        from ftrun.verbs.explain import explain

        _print_result(line, explain(line.overrides, quiet=line.json))
        return 0
    if line.rest:
        raise ConfigError(
            f'"{line.rest[0]}" is not of the form key=value', f"ftrun {line.verb} {line.rest[0]}", "See `ftrun --help`."
        )
    from ftrun.config import compose

    if line.sweep:
        compose.check_all(line.overrides, line.verb)
        return _through_hydra(line)
    if line.hydra_flags:
        compose.load(line.overrides, line.verb)
        return _through_hydra(line)
    if line.verb == "select" and len(compose.recipe_names(line.overrides)) > 1:
        from ftrun.verbs import run_together

        _print_result(line, run_together(compose.load_each(line.overrides), line.overrides))
        return 0
    composed = compose.load(line.overrides, line.verb)
    _print_result(line, execute(line.verb, composed, line))
    return 0


def _print_result(line: CommandLine, result: dict[str, Any] | None) -> None:
    if line.json and result is not None:
        print(json.dumps(result), flush=True)


def execute(verb: str, composed: Any, line: CommandLine) -> dict[str, Any] | None:
    """Carry out a verb on a checked config; its result is what --json prints."""
    from ftrun.verbs import run_verb

    return run_verb(verb, composed, line.overrides, html=line.html)


def _plain_verb(line: CommandLine) -> int:
    slot = None
    if "--slot" in line.hydra_flags:
        slot = line.rest.pop() if line.rest else None
    if line.verb == "recipes":
        from ftrun.reporting.catalogue import print_recipes

        print_recipes(line.rest[0] if line.rest else None, slot, line.json)
        return 0
    from ftrun.reporting.doctor import print_doctor

    print_doctor(line.json)
    return 0


def _through_hydra(line: CommandLine) -> int:
    """Sweeps, launchers and Hydra's own flags: the real @hydra.main, told our verb apart from its arguments."""
    import hydra
    from omegaconf import DictConfig

    from ftrun.config import compose
    from ftrun.verbs.sweep import Sweep

    failed: list[int] = []
    base, _ = compose.base_of(line.verb, line.overrides)
    prepared = compose.prepare(line.overrides, base)
    sweep = Sweep.of(prepared) if line.sweep else None

    @hydra.main(version_base=None, config_path=None, config_name=compose.ROOT)
    def job(config: DictConfig) -> float | None:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        state = HydraConfig.get()
        choices: dict[str, Any] = OmegaConf.to_container(state.runtime.choices)  # type: ignore[assignment]
        words = [word for word in state.overrides.task if not (base and word == f"recipe={base.name}")]
        on_run = any(word.startswith(("run=", "resume=")) for word in words)  # its settings are the defaults
        number = int(state.job.num) if sweep else 0
        try:
            composed = (
                compose.load(words, line.verb) if on_run else compose.resolve(config, choices, words, verb=line.verb)
            )
            if sweep:
                sweep.place(composed.settings, number)
            result = execute(line.verb, composed, CommandLine(line.verb, words))
        except Exception as error:
            known = error if isinstance(error, FtrunError) else unexpected(error)
            failed.append(say(known))
            if sweep:
                sweep.record(number, words, None, known)
            if failed[-1] in (130, 143):
                raise KeyboardInterrupt from error
            return None
        if sweep:
            sweep.record(number, words, result)
        _print_result(line, result)
        return (result or {}).get("final_loss")

    sys.argv = ["ftrun", *line.hydra_flags, *prepared]
    job()
    return sweep.finish() if sweep else failed[0] if failed else 0
