"""Which source code a result comes from: a module, and every project module that it imports in turn, read and not run."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ftrun import registry
from ftrun.runs.lockfile import version

# what computes: a result made with another version of one of these is made again
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "numpy", "scikit-learn")
NAMES = ("ftrun.config", "ftrun.registry")  # hand out components by names that their callers give


@dataclass(frozen=True)
class Source:
    """A module as its text tells of it."""

    digest: str
    imports: frozenset[tuple[str, ...]]  # ("a.b.c", "a.b") for ``from a.b import c``: the first that is a module counts
    builds: frozenset[tuple[str, str | None]]  # (slot, name) of components that it makes; None: chosen while it runs


def sources(modules: Iterable[str], chosen: Mapping[str, Iterable[str]] | None = None) -> dict[str, str]:
    """Hash of the source of these modules, and of all project modules and components that they lead to, by name.

    ``chosen``: names of the components that a run takes in a slot. A component whose name is only known while the code
    runs stands for those, and for its whole slot where nothing is said of it. Project modules are ours and, for a
    component of an installed package, those of that package.
    """
    chosen = chosen or {}
    wanted = [*modules, *(m for slot, names in chosen.items() for name in names for m in _component(slot, name))]
    packages = {"ftrun", *(module.partition(".")[0] for module in wanted)}
    found: dict[str, str] = {}
    while wanted:
        module = wanted.pop()
        file = _file(module) if module not in found else None
        if file is None:
            continue
        source = _read(file, module)
        found[module] = source.digest
        wanted += [next((name for name in names if _ours(name, packages)), "") for names in source.imports]
        for slot, name in source.builds:
            names = [name] if name else chosen.get(slot, registry.specs(slot))
            wanted += [part for one in names for part in _component(slot, one)]
    return dict(sorted(found.items()))


def _ours(module: str, packages: set[str]) -> bool:
    return module.partition(".")[0] in packages and _file(module) is not None


def versions(libraries: Iterable[str] = LIBRARIES) -> dict[str, str | None]:
    """Versions of Python, to the minor number, and of these libraries; None where one is not installed."""
    return {"python": platform.python_version().rpartition(".")[0]} | {name: version(name) for name in libraries}


def _component(slot: str, name: str) -> list[str]:
    """Modules that a component is written in; several joined by + are so many components."""
    spec = registry.find(slot, name)
    return [spec.module, *(registry.find(slot, part).module for part in spec.parts)]


def _file(module: str) -> Path | None:
    """Where the source of a module lies; None where the name means no module, or one without a text."""
    top, _, rest = module.partition(".")
    base = registry.PACKAGE if top == "ftrun" else _location(top)
    if base is None or (base.suffix == ".py" and rest):
        return None
    place = base.joinpath(*rest.split(".")) if rest else base
    candidates = (place, place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((file for file in candidates if file.suffix == ".py" and file.is_file()), None)


@functools.cache
def _location(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module made by hand, __main__ for one
        return None
    if spec is None:
        return None
    folders = spec.submodule_search_locations
    return Path(next(iter(folders))) if folders else Path(spec.origin) if spec.origin else None


@functools.cache  # what runs is what was there when it was first read
def _read(file: Path, module: str) -> Source:
    text = file.read_bytes()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    imports: set[tuple[str, ...]] = set()
    builds: set[tuple[str, str | None]] = set()
    for node in _run_nodes(ast.parse(text)):
        if isinstance(node, ast.Import):
            imports |= {(alias.name,) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(node, package)
            imports |= {(f"{origin}.{alias.name}", origin) for alias in node.names}
        elif isinstance(node, ast.Call) and not module.startswith(NAMES) and (built := _built(node)):
            builds.add(built)
    return Source(hashlib.sha256(text).hexdigest()[:16], frozenset(imports), frozenset(builds))


def _run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``, which never run."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    above = ".".join(parts[: len(parts) - node.level + 1])
    return f"{above}.{node.module}" if node.module else above


def _built(call: ast.Call) -> tuple[str, str | None] | None:
    """What ``registry.build("slot", "name")``, ``settings.component("slot")`` and ``settings.evaluators()`` make."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    words = [argument.value if isinstance(argument, ast.Constant) else None for argument in call.args[:2]]
    if called == "evaluators":
        return "eval", None
    if called not in ("build", "component") or not words or words[0] not in registry.SLOTS:
        return None
    name = words[1] if called == "build" and len(words) > 1 else None
    return str(words[0]), None if name is None else str(name)
