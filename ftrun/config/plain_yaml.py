"""YAML that other people wrote, read as plain values: bounded in size, depth and time, and never as code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ftrun.errors import ConfigError

LARGEST = 1 << 20  # bytes of a recipe
DEEPEST = 50  # brackets or indentations around a value; the parser in C dies of thousands
MOST = 5000  # values of a recipe, each counted as often as an alias repeats it
TAGS = ("null", "bool", "int", "float", "str", "seq", "map")
MERGE = "tag:yaml.org,2002:merge"
_BaseLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is twenty times faster


class Loader(_BaseLoader):
    """Plain values only: 1e-5 is a number, 007, 1:30 and a date are text, no key comes twice."""

    yaml_implicit_resolvers: ClassVar = {
        first: [
            (tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "int", "float")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in TAGS
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) and type(key) is not int:
                _refuse(f"the key {key!r:.50} is no name; quote it to make it one", key_node.start_mark)
            if key in seen:
                _refuse(f"key {key!s:.50} comes twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]{0,2}(_[0-9]{3})+|[1-9][0-9]*)$"), list("-+0123456789")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^[-+]?(([0-9][0-9_]*)?\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*\.([eE][-+]?[0-9]+)?
        |[0-9][0-9_]*[eE][-+]?[0-9]+|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def _refuse(problem: str, mark: Any) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, mark)


def read_text(file: Path, largest: int = LARGEST) -> str:
    """The text of a small UTF-8 file, with or without a byte order mark. Raises ConfigError."""
    try:
        with file.open("rb") as stream:
            content = stream.read(largest + 1)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read", str(error.strerror)) from None
    if len(content) > largest:
        raise ConfigError(f"{file} is larger than {largest >> 20} MB", str(file), "No recipe or config is that long.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"{file} is not valid YAML: it is not UTF-8 ({error.reason})"
        raise ConfigError(what, f"{file}:{line}", "Convert it to UTF-8.") from None


def parse(text: str, file: Path, most: int = MOST) -> Any:
    """The one document of a text as plain values, None for an empty one. Raises ConfigError naming file and line."""
    try:
        _measure(text, most)
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError(f"{file} is not valid YAML: {_reason(error)}", where, "Mend that line.") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, IndexError) as error:  # a tag that its value does not fit
        what = f"{file} is not valid YAML: {' '.join(str(error).split())}"
        raise ConfigError(what, str(file), "Mend the file.") from None


def _reason(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem or error.context)
    tag = re.search(r"constructor for the tag '(?:tag:yaml.org,2002:)?([^']*)'", problem)
    return f"the tag !!{tag[1]:.100} stands for more than plain values" if tag else problem


def _measure(text: str, most: int) -> None:
    """Refuse a document that is too deep, or that aliases make endless or huge, before anything is built of it."""
    sizes: dict[str, int | None] = {}  # anchor -> values below it; None while it is open
    open_nodes: list[tuple[str | None, int]] = []  # anchor and values so far of every node around
    for event in yaml.parse(text, Loader=_BaseLoader):
        size = 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if event.anchor:
                sizes[event.anchor] = None
            if len(open_nodes) > DEEPEST:
                _refuse(f"it is nested deeper than {DEEPEST} levels", event.start_mark)
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            if anchor:
                sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            told = sizes.get(event.anchor, 1)
            if told is None:
                _refuse(f"*{event.anchor} stands for what it is a part of", event.start_mark)
            size = told or 1
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if open_nodes:
            anchor, so_far = open_nodes[-1]
            open_nodes[-1] = (anchor, so_far + size)
            if so_far + size > most:
                _refuse(f"it holds more than {most:,} values", event.start_mark)
