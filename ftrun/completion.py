"""Tab completion: what may follow on a command line, and how bash, zsh and fish ask for it."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator, Sequence

from ftrun import registry
from ftrun.config import recipes
from ftrun.config.cluster import SECTION as CLUSTER
from ftrun.config.cluster import cluster_knobs
from ftrun.config.recipes import DEFAULT_CHOICES
from ftrun.config.settings import SECTIONS, root_knobs, section_knobs, shared_select_knobs, shared_tokens_knobs
from ftrun.config.store import group_files
from ftrun.errors import ConfigError, FtrunError
from ftrun.registry import Knob

# bash cuts words at = and completes the piece behind it; zsh and fish complete the whole word
SCRIPTS = {
    "bash": """_ftrun() {
    local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}" word
    word="${line##* }"
    COMPREPLY=($(FTRUN_LINE="$line" ftrun --complete 2>/dev/null))
    if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}"); fi
}
complete -o nospace -o default -F _ftrun ftrun
""",
    "zsh": """_ftrun() {
    local -a found
    found=(${(f)"$(FTRUN_LINE="$LBUFFER" ftrun --complete 2>/dev/null)"})
    if (( $#found )); then compadd -Q -S '' -- $found; else _files -P "${PREFIX%%=*}="; fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _ftrun ftrun
""",
    "fish": """function __ftrun
    FTRUN_LINE=(commandline -cp) ftrun --complete 2>/dev/null
end
complete -c ftrun -a '(__ftrun)'
""",
}
FLAGS = ("--json", "--help", "--recipes ", "-m ", "--cfg job")


def answer(argv: Sequence[str]) -> None:
    """``--completion SHELL`` prints a script; ``--complete`` prints what may follow $FTRUN_LINE, a line each."""
    if argv[0] == "--complete":
        print("\n".join(candidates(os.environ.get("FTRUN_LINE", ""))))
        return
    shell = next(iter(argv[1:]), "")
    if shell not in SCRIPTS:
        todo = f'Known: {", ".join(SCRIPTS)}. In ~/.bashrc: eval "$(ftrun --completion bash)"'
        raise ConfigError("completion for which shell?", f"ftrun --completion {shell}".strip(), todo)
    print(SCRIPTS[shell], end="")


def candidates(line: str) -> list[str]:
    """What the last word of a command line may become; nothing for a value that can be anything, as a path can."""
    from ftrun.reporting.manual import PAGES

    words = line.split()[1:]
    word = words.pop() if words and not line[-1:].isspace() else ""
    if not words:
        return sorted(f"{verb} " for verb in PAGES if verb.startswith(word))
    if word.startswith("-"):
        return [flag for flag in (*FLAGS, "--slot ") if flag.startswith(word)]
    if words[0] == "submit" and len(words) == 1 and not word.startswith("-"):
        return [verb for verb in ("select ", "train ") if verb.startswith(word)]
    if words[0] == "recipes":
        return sorted(name for name in recipes.catalogue() if name.startswith(word))
    prefix = word[: len(word) - len(word.lstrip("+"))]
    try:
        if "=" in word:
            return sorted(found for found in _values(word, words) if found.startswith(word))
        keys = set(_keys(words))
    except FtrunError:
        return []  # a recipe or a choice before the cursor is misspelt
    return sorted({prefix + found for found in _steps(keys, word.lstrip("+"))})


def _steps(keys: set[str], word: str) -> Iterator[str]:
    """Keys up to their next dot: adapter= and adapter. before adapter.r=."""
    for key in keys:
        if key.startswith(word):
            head, dot, _ = key[len(word) :].partition(".")
            yield word + head + (dot or "=")


def _values(word: str, words: Sequence[str]) -> Iterator[str]:
    key, _, value = word.partition("=")
    key = key.lstrip("+")
    done = word[: len(word) - len(value.rpartition(",")[2].lstrip("["))]  # earlier values of a list or a sweep
    slot = "picker" if key == "select.picker" else key
    if key == "recipe":
        names = list(recipes.catalogue())
    elif slot in registry.SLOTS:
        names = list(registry.specs(slot))
    elif slot in (*DEFAULT_CHOICES, CLUSTER):
        names = list(group_files(slot))
    else:
        knob = _knobs(words).get(key)
        names = _choices(knob.type) if knob else []
    yield from (done + name for name in names)


def _choices(kind: object) -> list[str]:
    """The words that a type takes: choices, true and false, null."""
    if typing.get_origin(kind) is typing.Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    if kind is bool:
        return ["true", "false"]
    if kind is type(None):
        return ["null"]
    return [word for part in typing.get_args(kind) for word in _choices(part)]


def _keys(words: Sequence[str]) -> Iterator[str]:
    yield from ("recipe", "select.picker", *(slot for slot in DEFAULT_CHOICES if slot != "picker"))
    yield from (CLUSTER for verb in words[:1] if verb == "submit")
    yield from (key for key in _knobs(words) if key not in ("paper", "fidelity", "differences"))


def _knobs(words: Sequence[str]) -> dict[str, Knob]:
    """Every key with a value, given the recipe and the choices that stand on the line already."""
    typed = dict(word.split("=", 1) for word in words if "=" in word)
    recipe = recipes.find(typed["recipe"]) if typed.get("recipe", "null") != "null" else None
    knobs = {f"{section}.{name}": knob for section in SECTIONS for name, knob in section_knobs(section).items()}
    knobs |= {f"select.{name}": knob for name, knob in shared_select_knobs().items()}
    knobs |= {f"tokens.{name}": knob for name, knob in shared_tokens_knobs().items()} | root_knobs()
    if words and words[0] == "submit":
        knobs |= {f"{CLUSTER}.{name}": knob for name, knob in cluster_knobs().items()}
    for slot in registry.SLOTS:
        prefix = "select.picker" if slot == "picker" else slot
        said = typed.get(prefix) or typed.get(slot) or (recipe.choice(slot) if recipe else DEFAULT_CHOICES[slot])
        names = said if isinstance(said, list) else said.strip("[]'\"").replace(registry.JOINT, ",").split(",")
        for name in filter(None, names):
            below = f"{prefix}.{name}" if slot == "eval" or len(names) > 1 else prefix
            knobs |= {f"{below}.{knob}": found for knob, found in registry.find(slot, name).knobs.items()}
    return knobs
