"""Every error that a user can meet: what happened, where, and what to do about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from ftrun.scrub import scrub

# what would break the line, or turn the text around it, in a terminal: a row's own words may stand in an error
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


LONGEST = 2000  # characters of a line: a value may be a whole book


def one_line(text: str) -> str:
    """The text as a terminal can show it: no secrets, line breaks or signs that turn it, and its middle left out where it is long."""
    text = scrub(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


class FtrunError(Exception):
    """Base of all errors that end a command with one clear message instead of a traceback.

    ``what`` is one line; ``where`` names the file, key or row; ``todo`` says the way out.
    ``exit_code`` is part of the command line's contract.
    """

    exit_code = 5
    secondary = False  # only the echo of another process's error

    def __init__(self, what: str, where: str = "", todo: str = ""):
        super().__init__(one_line(what))
        self.what, self.where, self.todo = one_line(what), where, todo

    def __str__(self) -> str:
        return "\n  ".join(one_line(part) for part in (self.what, self.where, self.todo) if part)


class ConfigError(FtrunError):
    """A wrong command line, key, value or recipe, or a mix of components that cannot work."""

    exit_code = 2


class DataError(FtrunError):
    """Rows that cannot be read, or that would train on nothing or on the wrong thing."""

    exit_code = 3


class ResourceError(FtrunError):
    """Not enough memory or disk."""

    exit_code = 4


class ComponentError(FtrunError):
    """A component of the chain failed while it ran."""

    exit_code = 5


class CheckpointError(ComponentError):
    """A checkpoint that is damaged, or belongs to another run."""

    exit_code = 2


class Interrupted(FtrunError):
    """Stopped from the keyboard."""

    exit_code = 130


class Preempted(FtrunError):
    """Asked to stop by SIGTERM or SIGUSR1; the state was saved first."""

    exit_code = 143


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``Did you mean "lora"?`` or the list of what exists."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    longer = [other for other in known if len(name) >= 3 and other.startswith((name + "_", name + "-"))]
    if longer:
        return f'Did you mean "{min(longer, key=len)}"?'
    if close:
        swapped = [other for other in close if sorted(other) == sorted(name)]  # two letters that changed places
        return f'Did you mean "{(swapped or close)[0]}"?'
    return "Known: " + ", ".join(known) + "." if known else ""
