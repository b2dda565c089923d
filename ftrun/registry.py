"""Components: found on disk, described without importing them, imported when they are used.

A component is one dataclass under ``@register(slot, name)``. Its fields are its knobs. Help, listings and the
checking of a config read those fields from the source text, so that no command has to import torch to say that a key
is misspelt.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import importlib.metadata
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ftrun.errors import ConfigError, nearest

PACKAGE = Path(__file__).parent

# slot -> folder below ftrun/ where its components lie, one file a method
SLOTS = {
    "select": "select/scorers",
    "picker": "select/pickers",
    "tokens": "tokens/policies",
    "adapter": "adapters",
    "quant": "quant",
    "objective": "objectives",
    "optim": "optim",
    "schedule": "schedules",
    "eval": "evaluation/evaluators",
}

# slots that take several components at once, as in tokens=[token_cleaning,talr], and what makes one of them
COMBINED = {"tokens": ("ftrun.tokens.several", "Several")}
JOINT = "+"  # between their names

# slots that the types of a library fill besides, and what reads them from its source
LIBRARIES = {"adapter": "ftrun.adapters.peft_types"}

Component = TypeVar("Component", bound=type)
_classes: dict[tuple[str, str], type] = {}


def register(slot: str, name: str) -> Callable[[Component], Component]:
    """Make a dataclass the component ``name`` of ``slot``."""
    if slot not in SLOTS:
        raise ConfigError(f'there is no slot "{slot}"', f"while registering {name}", nearest(slot, SLOTS))

    def mark(cls: Component) -> Component:
        cls.slot, cls.name = slot, name  # type: ignore[attr-defined]
        _classes[slot, name] = cls
        return cls

    return mark


@dataclass(frozen=True)
class Knob:
    """One field of a config dataclass, as its source states it."""

    name: str
    type: Any  # a typing object: int, str | None, Literal["a", "b"], list[str] ...
    default: Any
    help: str = ""


class Later(Mapping[str, Knob]):
    """Knobs that are read when somebody asks for one: most commands ask for those of a few components."""

    def __init__(self, read: Callable[[], Mapping[str, Knob]]):
        self._read = functools.cache(read)

    def __getitem__(self, name: str) -> Knob:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self._read()))


@dataclass(frozen=True)
class Spec:
    """What is known of a component without importing it.

    ``needs`` and ``lacks`` map a capability to the words that an error uses for it (see config/capabilities.py).
    """

    slot: str
    name: str
    module: str
    cls: str
    doc: str
    knobs: Mapping[str, Knob]
    needs: dict[str, str] = field(default_factory=dict)
    lacks: dict[str, str] = field(default_factory=dict)
    source: Path | None = None
    parts: tuple[str, ...] = ()  # names, where it stands for several components
    library: bool = False  # runs a type of a library (LIBRARIES): its class is made from the knobs that were read


def build(slot: str, name: str, knobs: dict[str, Any] | None = None) -> Any:
    """Import the component and create it with these knobs."""
    spec = find(slot, name)
    if spec.parts:
        made = [build(slot, part, (knobs or {}).get(part)) for part in spec.parts]
        return getattr(importlib.import_module(spec.module), spec.cls)(made)
    if spec.library:
        return _made_class(slot, name)(**(knobs or {}))
    if (slot, name) not in _classes:
        importlib.import_module(spec.module)
    return _classes[slot, name](**(knobs or {}))


@functools.cache
def _made_class(slot: str, name: str) -> type:
    """A dataclass of a library's type: what runs it, with the knobs that were read."""
    spec = find(slot, name)
    base = getattr(importlib.import_module(spec.module), spec.cls)
    fields = [
        (knob.name, knob.type, field(default_factory=functools.partial(copy.deepcopy, knob.default)))
        for knob in spec.knobs.values()
    ]
    said = {"slot": slot, "name": name, "__doc__": spec.doc, "needs": spec.needs, "lacks": spec.lacks}
    return make_dataclass(spec.cls, fields, bases=(base,), namespace=said)


def find(slot: str, name: str) -> Spec:
    """The spec of one component; an unknown name is a ConfigError that offers the nearest."""
    known = specs(slot)
    if JOINT in name and slot in COMBINED:
        return _combined(slot, name)
    if name not in known:
        raise ConfigError(f'{slot} has no choice "{name}"', f"{slot}={name}", nearest(name, known))
    return known[name]


def left_out(slot: str, name: str) -> str:
    """Why a type of a slot's library is not offered; empty where the library has none of the name, or it is."""
    return importlib.import_module(LIBRARIES[slot]).why_not(name) if slot in LIBRARIES else ""


def _combined(slot: str, name: str) -> Spec:
    """Several components as one; its knobs are theirs, below the name of each. Raises ConfigError for one that comes twice."""
    parts = [find(slot, part) for part in name.split(JOINT)]
    names = tuple(part.name for part in parts)
    if len(set(names)) < len(names):
        raise ConfigError(f"{slot} names a method twice", f"{slot}=[{','.join(names)}]", "Name it once.")
    module, cls = COMBINED[slot]
    knobs = {part.name: Knob(part.name, dict[str, Any], defaults(part)) for part in parts}
    return Spec(slot, name, module, cls, " ".join(names), knobs, parts=names)


def defaults(spec: Spec) -> dict[str, Any]:
    """The value of every knob that nobody sets."""
    return {name: knob.default for name, knob in spec.knobs.items()}


@functools.cache
def specs(slot: str) -> dict[str, Spec]:
    """All components of a slot by name: ours from disk, then those that installed packages bring."""
    found: dict[str, Spec] = {}
    if slot in LIBRARIES:
        found |= importlib.import_module(LIBRARIES[slot]).specs()
    for path in sorted((PACKAGE / SLOTS[slot]).rglob("*.py")):
        for spec in _specs_in(path):
            if spec.slot == slot:
                found[spec.name] = _with_library(found.get(spec.name), spec)
    _load_installed()
    for (its_slot, name), cls in _classes.items():
        if its_slot == slot and name not in found:
            path = Path(importlib.import_module(cls.__module__).__file__ or "")
            found |= {spec.name: spec for spec in _specs_in(path) if spec.slot == slot}
    return dict(sorted(found.items()))


def _with_library(read: Spec | None, ours: Spec) -> Spec:
    """A component of ours that runs a library's type: it has the knobs of the library, and those that it states itself."""
    if read is None:
        return ours
    knobs = Later(lambda: {**read.knobs, **ours.knobs})
    return replace(ours, knobs=knobs, needs=read.needs | ours.needs, lacks=read.lacks | ours.lacks, library=True)


@functools.cache
def _load_installed() -> None:
    for entry in importlib.metadata.entry_points(group="ftrun.components"):
        entry.load()


def _specs_in(path: Path) -> list[Spec]:
    if "@register(" not in path.read_text():
        return []
    result = []
    for node in _parsed(path)[0].body:
        if not isinstance(node, ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "register":
                slot, name = (ast.literal_eval(argument) for argument in decorator.args)
                constants = _class_constants(path, node.name)
                result.append(
                    Spec(
                        slot=slot,
                        name=name,
                        module=_module_name(path),
                        cls=node.name,
                        doc=ast.get_docstring(node) or "",
                        knobs=read_dataclass(path, node.name),
                        needs=constants.get("needs", {}),
                        lacks=constants.get("lacks", {}),
                        source=path,
                    )
                )
    return result


def _module_name(path: Path) -> str:
    if path.is_relative_to(PACKAGE):
        return ".".join(["ftrun", *path.relative_to(PACKAGE).with_suffix("").parts])
    for (_, _), cls in _classes.items():
        if Path(importlib.import_module(cls.__module__).__file__ or "") == path:
            return cls.__module__
    raise ConfigError(f"{path} is not part of an importable package")


# ---- reading a dataclass from its source ----

_TYPE_NAMES = {"Any": Any, "Literal": Literal, "None": None, "int": int, "float": float, "str": str, "bool": bool}
_TYPE_NAMES |= {"list": list, "dict": dict, "tuple": tuple, "Optional": typing.Optional, "Union": typing.Union}


@functools.cache
def _parsed(path: Path) -> tuple[ast.Module, list[bytes]]:
    """The syntax tree and the lines."""
    source = path.read_bytes()
    return ast.parse(source), source.splitlines()


def read_dataclass(path: Path, name: str) -> dict[str, Knob]:
    """Knobs of the dataclass ``name`` in ``path``, those of its bases first; the comment on its line is a knob's help."""
    knobs: dict[str, Knob] = {}
    for owner, node in reversed(_lineage(path, name)):
        lines = _parsed(owner)[1]
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            annotation = ast.unparse(item.annotation)
            if annotation.startswith(("ClassVar", "typing.ClassVar")):
                continue
            if item.value is None:
                raise ConfigError(f"{name}.{item.target.id} in {owner} has no default; every knob needs one")
            if any(isinstance(other, ast.ClassDef) and other.name == annotation for other in _parsed(owner)[0].body):
                inside = read_dataclass(owner, annotation)  # a section inside this one
                knobs |= {
                    f"{item.target.id}.{sub}": replace(knob, name=f"{item.target.id}.{sub}")
                    for sub, knob in inside.items()
                }
                continue
            kind = eval(annotation, {"__builtins__": {}}, _TYPE_NAMES)
            # the formatter moves the comment of a long line into parentheses, behind the value
            help_text = _comment_after(item, lines) or _comment_after(item.value, lines)
            knobs[item.target.id] = Knob(item.target.id, kind, _default(item.value), help_text)
    return knobs


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with dotted names as sections inside sections."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


def _comment_after(node: ast.stmt | ast.expr, lines: list[bytes]) -> str:
    rest = lines[(node.end_lineno or 1) - 1][node.end_col_offset or 0 :]
    return rest.decode().partition("#")[2].strip()


def marked(slot: str, constant: str) -> list[str]:
    """Names of the components of a slot whose class says ``constant: ClassVar[bool] = True``."""
    return [spec.name for spec in specs(slot).values() if constant_of(spec, constant)]


def constant_of(spec: Spec, constant: str) -> Any:
    """The value of ``constant: ClassVar[...] = ...`` in the class of a component; None where it states none."""
    return _class_constants(spec.source, spec.cls, (constant,)).get(constant) if spec.source else None


def _class_constants(path: Path, name: str, wanted: tuple[str, ...] = ("needs", "lacks")) -> dict[str, Any]:
    """Literal class attributes such as ``needs: ClassVar[...] = {...}``, nearest class last."""
    values: dict[str, Any] = {}
    for _, node in reversed(_lineage(path, name)):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
                if item.target.id in wanted:
                    values[item.target.id] = ast.literal_eval(item.value)
    return values


def _lineage(path: Path, name: str) -> list[tuple[Path, ast.ClassDef]]:
    """The class and its bases as far as their source is ours, nearest first."""
    tree, _ = _parsed(path)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            line = [(path, node)]
            for base in node.bases:
                if isinstance(base, ast.Name):
                    line += _lineage(_defining_file(tree, path, base.id), base.id)
            return line
    return []


def _defining_file(tree: ast.Module, path: Path, name: str) -> Path:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ftrun":
            if any((alias.asname or alias.name) == name for alias in node.names):
                parts = (node.module or "").split(".")[1:]
                return PACKAGE.joinpath(*parts).with_suffix(".py")
    return path


def _default(node: ast.expr) -> Any:
    """The value of a default: a literal, or ``field(default_factory=list | dict | lambda: literal)``."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "field":
        for keyword in node.keywords:
            if keyword.arg == "default":
                return ast.literal_eval(keyword.value)
            if keyword.arg == "default_factory":
                if isinstance(keyword.value, ast.Lambda):
                    return ast.literal_eval(keyword.value.body)
                return {"list": [], "dict": {}}[ast.unparse(keyword.value)]
    return ast.literal_eval(node)


def type_name(kind: Any) -> str:
    """A type as a user reads it: ``int``, ``text or null``, ``a | b``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, dict) and arguments:
        return f"{origin.__name__} of {' to '.join(type_name(argument) for argument in arguments)}"
    if kind is str:
        return "text"
    if kind is Any:
        return "any"
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if isinstance(kind, types.UnionType) or origin is typing.Union:
        return " | ".join(type_name(option) for option in arguments)
    if kind is type(None):
        return "null"
    return getattr(kind, "__name__", str(kind))
