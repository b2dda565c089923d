"""Chat templates are programs of strangers: jinja's sandbox keeps them from code and files, and this from all memory."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 1 << 25  # characters, entries or rounds that a template may make of one conversation
WIDTH = re.compile(r"\d{6,}")  # of a padded field


class _Generator(CodeGenerator):
    def visit_Concat(self, node: Any, frame: Any) -> None:
        self.write("environment.join_bounded((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Bounded(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, with an end to what can be multiplied, padded, joined, counted and written."""

    code_generator_class = _Generator
    intercepted_binops: ClassVar[frozenset[str]] = frozenset(["*", "**", "+", "%"])  # type: ignore[misc]

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.rounds = 0
        self.globals["range"] = self._range
        self.filters = {name: _bounded_filter(work) for name, work in self.filters.items()}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) if isinstance(side, str | list | tuple) else None for side in (left, right)]
        if operator == "*" and any(size is not None for size in sizes):
            _check(
                max(sizes[0] if sizes[0] is not None else left, 1) * max(sizes[1] if sizes[1] is not None else right, 1)
            )
        elif operator == "+":
            _check(sum(size or 0 for size in sizes))
        elif operator == "**":
            _check(abs(right) * (abs(left).bit_length() if isinstance(left, int) else 1))
        elif operator == "%" and isinstance(left, str):
            _check_widths([left])
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_widths([owner if __obj.__name__ in ("format", "format_map") else "", *args, *options.values()])
        found = super().call(__context, __obj, *args, **options)
        _check(len(found) if isinstance(found, str) else 0)
        return found

    def join_bounded(self, parts: Iterable[Any]) -> str:
        texts = [str(part) for part in parts]
        _check(sum(map(len, texts)))
        return "".join(texts)

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """What a whole template writes."""
        self.rounds, length, texts = 0, 0, []
        for text in parts:
            length += len(text)
            _check(length)
            texts.append(text)
        return "".join(texts)

    def _range(self, *args: int) -> range:
        found = range(*args)
        try:
            self.rounds += len(found)
        except OverflowError:
            self.rounds = LONGEST + 1
        _check(self.rounds * 8)  # a round does something
        return found


def _bounded_filter(work: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(work)
    def bounded(*args: Any, **options: Any) -> Any:
        _check_widths([*args, *options.values()], formats=work.__name__ == "do_format")
        found = work(*args, **options)
        _check(len(found) if isinstance(found, str) else 0)
        return found

    return bounded


def _check_widths(values: Iterable[Any], formats: bool = True) -> None:
    for value in values:
        if isinstance(value, int):
            _check(abs(value))
        elif formats and isinstance(value, str) and len(value) < 1000 and ("%" in value or "{" in value):
            if WIDTH.search(value):
                _check(LONGEST + 1)


def _check(size: float) -> None:
    if size > LONGEST:
        raise SecurityError("it makes more of a conversation than any model reads")


@functools.cache
def bound_templates() -> None:
    """Have transformers compile every chat template for this sandbox."""
    from transformers.utils import chat_template_utils

    chat_template_utils.ImmutableSandboxedEnvironment = Bounded  # type: ignore[attr-defined]
