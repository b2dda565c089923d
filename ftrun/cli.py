"""The command line: a verb, then Hydra overrides. Imports nothing heavy until a verb needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftrun.config.grammar import normal_override
from ftrun.errors import ComponentError, ConfigError, FtrunError, nearest
from ftrun.quiet import hush
from ftrun.scrub import scrub, scrubbed

HYDRA_VERBS = ("train", "select", "eval", "preview", "plan", "generate", "merge", "show")
PLAIN_VERBS = ("recipes", "doctor")
JOB_VERBS = ("submit", "status", "cancel")
VERBS = (*HYDRA_VERBS, *PLAIN_VERBS, *JOB_VERBS)
OWN_FLAGS = ("--json", "--html", "--long")
FLAGS_WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--info", "-i", "--experimental-rerun"),
)
PLAIN_FLAGS = ("-h", "--help", "--hydra-help", "--resolve", "--run", "-r", "--multirun", "-m")
FLAGS = (*OWN_FLAGS, *FLAGS_WITH_VALUE, *PLAIN_FLAGS, "--recipes", "--slot", "--long", "--version", "--completion")


@dataclass
class CommandLine:
    """A command line taken apart."""

    verb: str
    overrides: list[str] = field(default_factory=list)
    hydra_flags: list[str] = field(default_factory=list)
    json: bool = False
    html: bool = False
    long: bool = False
    slot: str | None = None
    rest: list[str] = field(default_factory=list)  # words that are neither (recipes PATTERN)
    typed: list[str] = field(default_factory=list)  # all words behind the verb

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
            from ftrun.reporting.manual import print_help

            print_help(next(iter(argv[1:]), None))
            return 0
        if argv[0] in ("--completion", "--complete"):
            from ftrun import completion

            completion.answer(argv)
            return 0
        if argv[0] == "--version":
            from ftrun.runs.lockfile import version

            print(f"ftrun {version('ftrun') or 'from a checkout'}")
            return 0
        hush()
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

        print(scrub("".join(traceback.format_exception(error))), file=sys.stderr)
    echo = error.secondary and os.environ.get("RANK", "0") != "0"
    if not leave_error(error) and not echo:
        text = f"ftrun: {error}".encode(errors="backslashreplace").decode()  # half a character of a file's name
        print(text, file=sys.stderr)
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
    if line.verb not in VERBS:
        raise ConfigError(f'there is no verb "{line.verb}"', f"ftrun {' '.join(argv)}", nearest(line.verb, VERBS))
    line.typed = list(words)
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            _take_flag(line, word, words)
        elif ("=" in word and not word.startswith("=")) or word.startswith("~"):
            line.overrides.append(normal_override(word))
        else:
            line.rest.append(word)
    return line


def _take_flag(line: CommandLine, word: str, words: list[str]) -> None:
    """Note one flag, and take its value from the words behind it. Raises ConfigError for a flag that there is not."""
    name, equals, value = word.partition("=")
    if name in OWN_FLAGS and not equals:
        setattr(line, name.removeprefix("--"), True)
        return
    if name in ("--recipes", "--slot", *FLAGS_WITH_VALUE):
        if not equals and not words:
            raise ConfigError(f"{name} takes a value", f"ftrun {line.verb} {name}", "See `ftrun --help`.")
        value = value if equals else words.pop(0)
        if name == "--slot":
            line.slot = value
        elif name == "--recipes":
            known = filter(None, [os.environ.get("FTRUN_RECIPES", ""), os.path.expanduser(value)])
            os.environ["FTRUN_RECIPES"] = os.pathsep.join(known)
        else:
            line.hydra_flags += [name, value]
    elif word in PLAIN_FLAGS:
        line.hydra_flags.append(word)
    else:
        from ftrun.config.words import dashed

        raise dashed(line.verb, word, words[0] if words and "=" not in words[0] else None, FLAGS)


def dispatch(line: CommandLine) -> int:
    """Hand the command line to its verb."""
    if "--help" in line.hydra_flags or "-h" in line.hydra_flags:
        from ftrun.reporting.manual import print_help

        print_help(line.verb)
        return 0
    if line.verb in PLAIN_VERBS:
        return _plain_verb(line)
    if line.verb in JOB_VERBS:
        return _job_verb(line)
    if line.verb == "select" and line.rest == ["explain"]:
        from ftrun.verbs.explain import explain

        _print_result(line, explain(line.overrides, quiet=line.json))
        return 0
    if line.rest:
        from ftrun.config import recipes, words

        if line.verb != "show" or len(line.rest) > 1 or line.rest[0] not in recipes.catalogue():
            raise words.bare_word(line.verb, line.rest[0], line.rest[1:])
        line.overrides.insert(0, f"recipe={line.rest.pop()}")  # ftrun show tshirt can mean one thing only
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
    if line.verb == "show":
        return _show(line)
    composed = compose.load(line.overrides, line.verb)
    _print_result(line, execute(line.verb, composed, line))
    return 0


def _print_result(line: CommandLine, result: dict[str, Any] | None) -> None:
    if line.json and result is not None:
        print(json.dumps(scrubbed(result)), flush=True)


def execute(verb: str, composed: Any, line: CommandLine) -> dict[str, Any] | None:
    """Carry out a verb on a checked config; its result is what --json prints."""
    from ftrun.verbs import run_verb

    return run_verb(verb, composed, line.overrides, html=line.html)


def _plain_verb(line: CommandLine) -> int:
    if line.verb == "recipes":
        from ftrun.reporting.catalogue import print_recipes

        if len(line.rest) > 1 or line.overrides:
            extra = [*line.rest[1:], *line.overrides][0]
            raise ConfigError(
                "one pattern, please", f"ftrun recipes ... {extra}", "A pattern takes *: ftrun recipes 'q*'"
            )
        print_recipes(line.rest[0] if line.rest else None, line.slot, line.json, line.long)
        return 0
    from ftrun.reporting.doctor import print_doctor

    print_doctor(line.json)
    return 0


def _job_verb(line: CommandLine) -> int:
    flags = [flag for flag in line.hydra_flags if flag not in ("-m", "--multirun")]
    if flags or (line.hydra_flags and line.verb != "submit"):
        told = "-m and --json" if line.verb == "submit" else "--json"
        raise ConfigError(
            f"ftrun {line.verb} does not take {(flags or line.hydra_flags)[0]}",
            f"ftrun {line.verb}",
            f"It takes {told}.",
        )
    if line.verb == "submit":
        from ftrun.config import words
        from ftrun.verbs.submit import submit

        if len(line.rest) > 1:
            raise words.bare_word(f"submit {line.rest[0]}", line.rest[1], line.rest[2:])
        result = submit(next(iter(line.rest), None), line.overrides, line.typed, line.sweep)
        if "script" in result and result["job"] is None and not line.json:
            print(result["script"], end="")
        elif not line.json:
            print(result["job"])
        _print_result(line, result)
        return 0
    what = [word.removeprefix("run=") for word in line.typed if not word.startswith("-")]
    if len(what) > 1:
        raise ConfigError("one run or job, please", f"ftrun {line.verb} {' '.join(what)}")
    from ftrun.verbs.cancel import cancel
    from ftrun.verbs.status import status

    _print_result(line, (status if line.verb == "status" else cancel)(next(iter(what), None)))
    return 0


def _show(line: CommandLine) -> int:
    """``ftrun show`` tells of the cluster section too, where it is named."""
    from ftrun.config import compose
    from ftrun.config.cluster import is_cluster_word, read_cluster

    words = [word for word in line.overrides if is_cluster_word(word)]
    cluster = read_cluster(words) if words else None
    line.overrides = [word for word in line.overrides if word not in words]
    composed = compose.load(line.overrides, line.verb)
    execute(line.verb, composed, line)
    if cluster:
        from ftrun.reporting.catalogue import print_cluster

        print_cluster(cluster, words)
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
