"""What a user types, in the grammar of Hydra: values arrive exactly as they were meant."""

from __future__ import annotations

import os
import re

from ftrun.errors import ConfigError

# text is never read as a number there; null stays null
TEXT_KEYS = (
    "prompt",
    "out",
    "run",
    "resume",
    "model.path",
    "model.revision",
    "model.template",
    "data.path",
    "data.heldout_path",
    "data.system",
    "select.model.path",
    "tokens.from",
    "launch.rendezvous",
)
FREE_TEXT = ("prompt", "data.system")  # sentences: a comma separates nothing, ${...} stands for nothing
RENAMED = {"select.scorer": "select", "select.picker": "picker", "select/picker": "picker"}
FUNCTIONS = "choice|range|interval|glob|sort|shuffle|tag|int|float|bool|str|extend_list"

_KEY = re.compile(r"(\+{0,2}|~)[A-Za-z_][\w-]*([./][A-Za-z0-9_][\w-]*)*", re.ASCII)
_NUMBER = re.compile(
    r"[+-]?(\d[\d_]*(\.[\d_]*)?([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|inf|nan)|true|false", re.ASCII | re.IGNORECASE
)
# what the grammar reads as it stands: plain characters, escaped ones, and ${...}
_READABLE = re.compile(
    r"([A-Za-z0-9_/+.%*@?|: \t$-]|\\[\\()\[\]{}:=, \t]|\\(?![\\()\[\]{}:=,\s'\"$])|\$\{[^{}'\"]+\})*"
)
_INTERPOLATION = re.compile(r"\$\{[^{}'\"]+\}")
_ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
_PAIRS = {"[": "]", "{": "}", "(": ")"}


def normal_override(word: str) -> str:
    """The override as Hydra reads it: slots under their group names, values quoted where they need it.

    Raises ConfigError for an open quote or bracket.
    """
    if "=" not in word:
        return word
    typed, _, value = word.partition("=")
    name = typed.lstrip("+~")
    _check_characters(word, name)
    key = typed.removesuffix(name) + RENAMED.get(name, name)
    try:
        return f"{key}={_value(name, value)}"
    except ConfigError as error:
        raise ConfigError(error.what, word, error.todo) from None


def check_key(word: str) -> None:
    """Raise ConfigError for an override whose left side can be no key."""
    typed, equals, _ = word.partition("=")
    if not typed.strip("+~"):
        raise ConfigError(f'"{word}" has no key', word, "Write it as key=value, with no spaces around the =.")
    if not _KEY.fullmatch(typed):
        todo = "A key is made of names with dots between them, as in data.path=my.jsonl."
        raise ConfigError(f'"{typed}" cannot be a key', word, todo)
    if not equals and not typed.startswith("~"):
        raise ConfigError(f'"{word}" is not of the form key=value', word, "Write it as key=value.")


def quote(text: str, literal: bool = True) -> str:
    """Text as a quoted string of the grammar; with ``literal``, ``${`` is no interpolation."""
    if literal:
        text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)
    doubled = re.sub(r"(\\+)(?='|$)", lambda match: match[1] * 2, text)
    return "'" + doubled.replace("'", "\\'") + "'"


def _check_characters(word: str, name: str) -> None:
    if "\0" in word:
        raise ConfigError(f"the value of {name} holds a NUL character", name, "Leave it out.")
    try:
        word.encode()
    except UnicodeEncodeError:
        shown = word.encode(errors="backslashreplace").decode()
        raise ConfigError(
            f"{name} is not valid UTF-8", shown, "Rename the file, or set the terminal to UTF-8."
        ) from None


def _value(key: str, value: str) -> str:
    stripped = value.strip()
    if not stripped:
        return value and quote(value)
    if key in FREE_TEXT and stripped[0] not in "'\"" and stripped != "null":
        words = key != "prompt" and re.fullmatch(r"[\w.,:/-]+", value, re.ASCII)  # may be a sweep
        return value if words else quote(value)
    return ",".join(_element(part, key in TEXT_KEYS) for part in _split(stripped))


def _element(text: str, is_text: bool) -> str:
    """One value of a sweep, or one entry of a list."""
    core = text.strip()
    if not core:
        return text
    if core[0] in "'\"":
        if _end_of_quote(core, 0) < len(core) - 1:
            raise ConfigError("there is text behind a closing quote", core, "Quote the whole value, or no part of it.")
        return core
    if core[0] in "[{":
        end = _end_of_bracket(core, 0)
        if end is None:
            raise ConfigError("a bracket stays open", core, f'Close it with "{_PAIRS[core[0]]}", or quote the value.')
        if end == len(core) - 1:
            if core[0] == "{":
                return "{" + ",".join(_entry(part) for part in _split(core[1:-1], starts=",:")) + "}"
            return "[" + ",".join(_element(part, is_text) for part in _split(core[1:-1])) + "]"
    if re.fullmatch(rf"({FUNCTIONS})\s*\(.*\)", core, re.DOTALL):
        return core
    if is_text and core.startswith("~/"):
        core = os.path.expanduser(core)  # no shell does it behind an equals sign
    if is_text and (_NUMBER.fullmatch(core) or (" " in core and _READABLE.fullmatch(core) and "\\" not in core)):
        return quote(core)
    if _READABLE.fullmatch(core):
        return core
    plain = _ESCAPED.sub(r"\1", core)
    return quote(plain, literal=not _INTERPOLATION.search(plain))


def _entry(text: str) -> str:
    """``name: value`` of a table."""
    name, *rest = _split(text, ":", starts=",:")
    if not rest:
        return text
    name = name.strip()
    plain = name[1:-1] if name[:1] in ("'", '"') else _ESCAPED.sub(r"\1", name)
    escaped = re.sub(r"[\\()\[\]{}:=, \t]", lambda match: "\\" + match[0], plain)
    if not _READABLE.fullmatch(escaped):
        todo = "Plain letters, digits, spaces and punctuation can; a recipe file takes any name."
        raise ConfigError(f'the name "{plain}" cannot be typed', name, todo)
    return f"{escaped}: {_element(':'.join(rest), False)}"


def _split(text: str, mark: str = ",", starts: str = ",") -> list[str]:
    """Cut at ``mark`` outside quotes and brackets; a quote opens behind one of ``starts`` only, as in it's.

    Raises ConfigError for a quote that stays open.
    """
    parts, start, at, fresh = [], 0, 0, True
    while at < len(text):
        if text[at] in "'\"" and fresh:
            at = _end_of_quote(text, at)
        elif text[at] == "\\":
            at += 1
        elif text[at] in _PAIRS:
            at = _end_of_bracket(text, at) or at
        elif text[at] == mark:
            parts.append(text[start:at])
            start = at + 1
        fresh = at < len(text) and (text[at] in starts or (fresh and text[at].isspace()))
        at += 1
    return [*parts, text[start:]]


def _end_of_quote(text: str, at: int) -> int:
    """Where the quote that opens at ``at`` closes; an odd number of backslashes keeps one from closing."""
    closing = re.compile(r"(?<!\\)(?:\\\\)*" + text[at]).search(text, at + 1)
    if closing is None:
        raise ConfigError("a quote stays open", text[at:], "Close it; a quote inside a text is written \\' or \\\".")
    return closing.end() - 1


def _end_of_bracket(text: str, at: int) -> int | None:
    """Where the bracket that opens at ``at`` closes; None when it does not."""
    open_brackets, fresh = [], False
    while at < len(text):
        letter = text[at]
        if letter in "'\"" and fresh:
            at = _end_of_quote(text, at)
        elif letter == "\\":
            at += 1
        elif letter in _PAIRS:
            open_brackets.append(_PAIRS[letter])
        elif letter == open_brackets[-1]:
            open_brackets.pop()
            if not open_brackets:
                return at
        fresh = letter in ",:[{(" or (fresh and letter.isspace())
        at += 1
    return None
