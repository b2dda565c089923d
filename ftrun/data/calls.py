"""Calls of tools as models write them, and the tools that a conversation offers.

Read are ``name(key=value, ...)`` at the beginning of a text, and anywhere a JSON object with the keys ``name`` and
``arguments`` (or ``parameters``).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ftrun.data.records import Record

TOOLS = "tools"  # column of a row that lists its tools
WRITTEN = re.compile(r"\s*(?:<[^>]*>|\[)?\s*([A-Za-z_][\w.\-]*)\s*(?=\()")
DEFINED = re.compile(r"\bdef\s+([\w.\-]+)\s*\(([^)]*)\)")
ARGUMENTS = ("arguments", "parameters")
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Call:
    """One call. Places count the characters of its text."""

    name: str
    arguments: dict[str, Any]
    name_start: int
    last: tuple[int, ...]  # last character of each argument's value, a closing quote not counted


def read_call(text: str) -> Call | None:
    """The first call of a text; None where there is none that can be read."""
    return _written_call(text) or _json_call(text)


def _written_call(text: str) -> Call | None:
    begin = WRITTEN.match(text)
    if begin is None:
        return None
    body = text[begin.end() : _closing(text, begin.end()) + 1]
    try:
        tree = ast.parse(f"f{body}", mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    if not isinstance(tree, ast.Call) or tree.args or any(part.arg is None for part in tree.keywords):
        return None
    lines = f"f{body}".split("\n")
    arguments, last = {}, []
    for part in tree.keywords:
        value = part.value
        before = sum(len(line) + 1 for line in lines[: (value.end_lineno or 1) - 1])
        inside = len(lines[(value.end_lineno or 1) - 1].encode()[: value.end_col_offset or 0].decode())
        end = begin.end() - 1 + before + inside
        arguments[str(part.arg)] = _value(value)
        last.append(_inner_end(text, end))
    return Call(begin[1], arguments, begin.start(1), tuple(last))


def _closing(text: str, start: int) -> int:
    """Place of the bracket that closes the one at ``start``; the end of the text where none does."""
    depth, quote, at = 0, "", start
    while at < len(text):
        letter = text[at]
        if quote:
            at += letter == "\\"
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    return len(text)


def _value(node: ast.expr) -> Any:
    named = {"true": True, "false": False, "null": None}  # written as in JSON
    if isinstance(node, ast.Name) and node.id in named:
        return named[node.id]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _json_call(text: str) -> Call | None:
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            found, end = DECODER.raw_decode(text, start)
        except ValueError:
            continue
        key = next((key for key in ARGUMENTS if isinstance(found.get(key), dict)), None)
        if key is None or not isinstance(found.get("name"), str):
            continue
        block = _value_of(text, key, start, end)
        begin = _value_of(text, "name", start, end)
        if block < begin:  # an argument of its own may be called name
            begin = _value_of(text, "name", DECODER.raw_decode(text, block)[1], end)
        at, last = block, []
        for name in found[key]:
            at = _value_of(text, name, at, end)
            _, at = DECODER.raw_decode(text, at)
            last.append(_inner_end(text, at))
        return Call(found["name"], found[key], begin + 1, tuple(last))
    return None


def _value_of(text: str, key: str, start: int, end: int) -> int:
    """Place where the value of a key begins, looked for from ``start``."""
    written = re.compile(rf"(?:{re.escape(json.dumps(key))}|{re.escape(json.dumps(key, ensure_ascii=False))})\s*:\s*")
    found = written.search(text, start, end)
    return found.end() if found else start


def _inner_end(text: str, end: int) -> int:
    """The last character of a value that ends before ``end``, a closing quote not counted."""
    return end - 2 if text[end - 1] in "'\"" and end > 1 else end - 1


def tools_of(record: Record) -> dict[str, list[str] | None]:
    """Names of the tools that a conversation offers, each with its parameters, None where they are not known.

    They stand in the row's column ``tools``, as JSON or Python definitions in its system message, or nowhere.
    """
    listed: Any = list(record.tools) or record.fields.get(TOOLS)
    if isinstance(listed, str):
        listed = list(_objects(listed)) or listed
    found = dict(_described(listed)) if listed else {}
    if found:
        return found
    text = "\n".join(message.content for message in record.messages if message.role == "system")
    if defined := DEFINED.findall(text):
        return {name: re.findall(r"(?:^|,)\s*(\w+)", given) for name, given in defined}
    return dict(_described(list(_objects(text))))


def _described(listed: Any) -> Iterator[tuple[str, list[str] | None]]:
    """Tools from a list of names or of descriptions, the usual ``{type: function, function: {...}}`` among them."""
    for item in listed if isinstance(listed, list) else [listed]:
        if isinstance(item, list):
            yield from _described(item)
        elif isinstance(item, str) and re.fullmatch(r"[\w.\-]+", item):
            yield item, None
        elif isinstance(item, dict):
            inner = item["function"] if isinstance(item.get("function"), dict) else item
            if isinstance(inner.get("name"), str):
                given = inner.get("parameters")
                given = given.get("properties", given) if isinstance(given, dict) else given
                yield inner["name"], list(given) if isinstance(given, dict) else None


def _objects(text: str) -> Iterator[Any]:
    """The outermost JSON lists and objects that stand in a text."""
    at = 0
    while begin := re.compile(r"[\[{]").search(text, at):
        try:
            found, at = DECODER.raw_decode(text, begin.start())
            yield found
        except ValueError:
            at = begin.end()


def call_reward(text: str, gold: Call, tools: dict[str, list[str] | None]) -> float:
    """Rule-based reward of a written call, from -2 to 1 (the IRM table of TL-Training, arXiv:2412.15495).

    Unreadable, or a tool that is not offered: -2; another tool than the right one: -1.5. Argument names may be unknown
    to the tool (hallucinated), known to it but not wanted (extra), or missing: all three -1.8, hallucinated and one
    other -1.3, extra and missing -1, hallucinated -0.8, one of the others -0.5. Only values wrong: -0.25. Right: 1.
    """
    call = read_call(text)
    if call is None or (tools and call.name not in tools):
        return -2.0
    if call.name != gold.name:
        return -1.5
    known = tools.get(call.name)
    given, wanted = set(call.arguments), set(gold.arguments)
    hallucinated = known is not None and not given <= set(known)
    extra = known is not None and bool((given - wanted) & set(known))
    missing = bool(wanted - given)
    if hallucinated:
        return {0: -0.8, 1: -1.3, 2: -1.8}[extra + missing]
    if extra or missing:
        return -1.0 if extra and missing else -0.5
    return 1.0 if call.arguments == gold.arguments else -0.25
