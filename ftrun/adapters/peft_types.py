"""Every type of the library peft as a component: its knobs are the fields of peft's config class, read and not imported.

A type that a new release of peft brings is there with it. What the types cannot do stands in peft_limits.py; what they
do when they run, in peft_type.py.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ftrun.adapters.peft_limits import HAND_WRITTEN, KNOBS, LEFT_OUT, NO_KNOBS, SLICED, UNSLICED, WHOLE
from ftrun.registry import Knob, Later, Spec

MODULE, CLASS = "ftrun.adapters.peft_type", "PeftType"  # what runs a type that has no file of its own
ROOTS = ("PeftConfig", "PeftConfigMixin")  # their fields are ours to decide: task, base model, version ...
PAPER = r"(?:huggingface\.co/papers|arxiv\.org/(?:abs|pdf))/(\d{4}\.\d{4,5})"
TYPES = {"Any": Any, "Literal": Literal, "None": None, "int": int, "float": float, "str": str, "bool": bool}
TYPES |= {"list": list, "dict": dict, "tuple": tuple, "Optional": typing.Optional, "Union": typing.Union}


@dataclass(frozen=True)
class Source:
    """One config class of peft as its text states it."""

    name: str  # of the type: "vera"
    config: str  # "VeraConfig"
    file: Path
    papers: tuple[str, ...]  # arXiv numbers in its text

    @property
    def lineage(self) -> list[tuple[Path, ast.ClassDef]]:
        """The class and its bases in peft, nearest first."""
        return list(_lineage(self.file, self.config))


def folder() -> Path | None:
    """Where peft lies; None where it is not installed."""
    found = importlib.util.find_spec("peft")  # finds without importing
    return Path(found.origin).parent if found and found.origin else None


@functools.cache
def specs() -> dict[str, Spec]:
    """The types that are offered, by name."""
    return {name: _spec(source) for name, source in _sources().items() if name not in HAND_WRITTEN | LEFT_OUT.keys()}


def why_not(name: str) -> str:
    """Why a type of peft is not offered; empty where nothing of the name is known."""
    return LEFT_OUT.get(name, "")


def config_class(name: str) -> Any:
    """peft's own config class of a type; this imports peft."""
    source = _sources()[name]
    module = importlib.import_module(".".join(["peft", *source.file.relative_to(_home()).with_suffix("").parts]))
    return getattr(module, source.config)


# ---- finding the classes ----


def _home() -> Path:
    home = folder()
    assert home is not None
    return home


@functools.cache
def _sources() -> dict[str, Source]:
    """By a look at the text; what it says is read when somebody asks for it."""
    home = folder()
    found = {}
    for file in sorted(home.glob("tuners/*/config.py")) if home else []:
        text = file.read_text()
        for config, body in re.findall(r"^class (\w+)\(.*?\):\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL):
            if said := re.search(r"^        self\.peft_type = PeftType\.(\w+)$", body, re.MULTILINE):
                name = said[1].lower()
                found[name] = Source(name, config, file, tuple(re.findall(PAPER, text)))
    return found


@functools.cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())


def _lineage(file: Path, name: str) -> Iterator[tuple[Path, ast.ClassDef]]:
    for node in _parsed(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield file, node
            for base in node.bases:
                if isinstance(base, ast.Name) and base.id not in ROOTS and (place := _defined_in(file, base.id)):
                    yield from _lineage(place, base.id)


def _defined_in(file: Path, name: str) -> Path | None:
    """The file of peft that a class used in ``file`` is written in; None for one of another library."""
    for node in _parsed(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return file
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            return _file_of(node, file, name)
    return None


def _file_of(node: ast.ImportFrom, file: Path, name: str) -> Path | None:
    if node.level:
        place = file.parents[node.level - 1]
    elif (node.module or "").split(".")[0] == "peft":
        place = _home().parent
    else:
        return None
    place = place.joinpath(*(node.module or "").split("."))
    if place.is_dir():
        return _defined_in(place / "__init__.py", name)
    return _defined_in(place.with_suffix(".py"), name)


# ---- reading one ----


def _spec(source: Source) -> Spec:
    needs = {} if source.name in SLICED else {"whole_weights": WHOLE.get(source.name, UNSLICED)}
    knobs = Later(lambda: _knobs(source))
    return Spec("adapter", source.name, MODULE, CLASS, _doc(source), knobs, needs=needs, library=True)


def _knobs(source: Source) -> dict[str, Knob]:
    fields: dict[str, Knob] = {}
    for file, node in reversed(source.lineage):
        fields |= {knob.name: knob for knob in _fields(file, node)}
    dropped = NO_KNOBS["*"] | NO_KNOBS.get(source.name, {})
    knobs = {name: knob for name, knob in fields.items() if name not in dropped}
    if "target_modules" in knobs:
        knobs["target_modules"] = _targets(knobs["target_modules"])
    for name, default in KNOBS.get(source.name, {}).items():
        if name in knobs:
            knobs[name] = replace(knobs[name], default=default)
    return knobs


def _targets(knob: Knob) -> Knob:
    """All linear layers of the decoder, where nobody names others."""
    text = "names, a regex, all-linear, or kinds: attention, mlp, q, k, v, o, up ..."
    return replace(knob, type=list[str] | str | None, default="all-linear", help=text)


def _fields(file: Path, node: ast.ClassDef) -> Iterator[Knob]:
    """Fields whose type and default the text states; no other is a knob."""
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name) or item.value is None:
            continue
        try:
            kind, default = _kind(item.annotation, file), _default(item.value, file)
        except (NameError, TypeError, ValueError, SyntaxError):
            continue
        if default is None and not _takes_none(kind):
            kind = kind | None
        yield Knob(item.target.id, kind, default, _help(item.value))


def _takes_none(kind: Any) -> bool:
    return kind is Any or type(None) in typing.get_args(kind)


def _kind(annotation: ast.expr, file: Path) -> Any:
    names = {
        node.id: TYPES[node.id] if node.id in TYPES else _named(node.id, file)
        for node in ast.walk(annotation)
        if isinstance(node, ast.Name)
    }
    kind = eval(ast.unparse(annotation), {"__builtins__": {}}, names)
    options = typing.get_args(kind) if typing.get_origin(kind) is typing.Union else (kind,)
    if any(typing.get_origin(option) is Literal and str in map(type, typing.get_args(option)) for option in options):
        # "one of these, or text" is peft's way to write that their names are taken as text
        return typing.Union[tuple(option for option in options if option is not str)]  # noqa: UP007
    return kind


def _named(name: str, file: Path) -> Any:
    """A name of ``file``: ``X = Literal[...]``, or an enumeration as the literal of its values. Raises NameError."""
    place = _defined_in(file, name) or file
    for node in _parsed(place).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return _kind(node.value, place)
        if isinstance(node, ast.ClassDef) and node.name == name and "Enum" in ast.unparse(node):
            return Literal[tuple(_members(node).values())]  # type: ignore[valid-type]
    raise NameError(name)


def _members(node: ast.ClassDef) -> dict[str, Any]:
    return {
        ast.unparse(item.targets[0]): ast.literal_eval(item.value)
        for item in node.body
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
    }


def _default(value: ast.expr, file: Path) -> Any:
    """The value of a default. Raises ValueError where the text does not tell it."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
        said = {keyword.arg: keyword.value for keyword in value.keywords}
        if "init" in said and ast.unparse(said["init"]) == "False":
            raise ValueError("not a parameter")
        if "default_factory" in said:
            return {"list": [], "dict": {}}.get(ast.unparse(said["default_factory"])) or _made(said["default_factory"])
        if "default" not in said:
            raise ValueError("no default")
        value = said["default"]
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
        place = _defined_in(file, value.value.id)
        for node in _parsed(place).body if place else []:
            if isinstance(node, ast.ClassDef) and node.name == value.value.id:
                return _members(node)[value.attr]
    return ast.literal_eval(value)


def _made(factory: ast.expr) -> Any:
    if isinstance(factory, ast.Lambda):
        return ast.literal_eval(factory.body)
    if ast.unparse(factory) in ("list", "dict"):
        return [] if ast.unparse(factory) == "list" else {}
    raise ValueError("made while it runs")


def _help(value: ast.expr) -> str:
    if isinstance(value, ast.Call):
        for keyword in value.keywords:
            if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                for key, text in zip(keyword.value.keys, keyword.value.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "help":
                        return _sentence(text)
    return ""


def _sentence(text: ast.expr) -> str:
    """The first sentence of a help text; the whole where it does not end."""
    try:
        said = " ".join(str(ast.literal_eval(text)).split())
    except ValueError:
        return ""
    return re.split(r"(?<=[a-z0-9)`'\"])\. (?=[A-Z])", said)[0].rstrip(".").replace("`", "")


def _doc(source: Source) -> str:
    """The name of a type, and its paper."""
    paper = f" (arXiv:{source.papers[0]})" if source.papers else ""
    return f"{source.config.removesuffix('Config')} of the library peft{paper}."
