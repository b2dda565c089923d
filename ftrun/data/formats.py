"""The layouts that rows come in: recognised by their keys, checked row by row, turned into Records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ftrun.data.meanings import ROW, Unfit, missing, refuse_row_keys
from ftrun.data.readers import FEEDBACK, READERS, weighed
from ftrun.data.records import Kind, Message, Record
from ftrun.errors import ConfigError, DataError, nearest

# layout -> sets of keys, each of which marks it; the first layout that fits wins: what says more stands before what says less
LAYOUTS: dict[str, tuple[frozenset[str], ...]] = {
    "preference": (
        frozenset({"chosen", "rejected"}),
        frozenset({"messages", "rejected_response"}),
        frozenset({"conversations", "rejected_response"}),
    ),
    "binary": (
        frozenset({"prompt", "completion", "label"}),
        *(
            frozenset({*answered, mark})
            for answered in (("messages",), ("conversations",), ("prompt", "response"), ("instruction", "output"))
            for mark in FEEDBACK
        ),
        frozenset({"prompt", "completion", "kto_tag"}),
    ),
    "messages": (frozenset({"messages"}),),
    "sharegpt": (frozenset({"conversations"}),),
    "alpaca": (frozenset({"instruction", "output"}),),
    "prompt_completion": (
        frozenset({"prompt", "completion"}),
        frozenset({"prompt", "response"}),
        frozenset({"instruction", "response"}),
    ),
    "prompts": (frozenset({"prompt", "answer"}), frozenset({"instruction", "answer"})),
    "classification": (frozenset({"text", "label"}),),
    "text": (frozenset({"text"}),),
}
KINDS: dict[str, Kind] = {
    "preference": "pairs",
    "binary": "binary",
    "prompts": "prompts",
    "classification": "labels",
    "text": "text",
}
NAMES = sorted(
    {"input", "context", "answer", "text_pair", "verifier", *ROW}.union(
        *(keys for sets in LAYOUTS.values() for keys in sets)
    )
)


@dataclass(frozen=True)
class Layout:
    """How the rows of one source are read."""

    format: str
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the source's name
    system: str | None = None  # system prompt of conversations that have none
    forced: bool = False  # the user named the format: keys of other layouts do not matter
    ignored: tuple[str, ...] = ()  # the source's columns that mean nothing

    @property
    def kind(self) -> Kind:
        return KINDS.get(self.format, "sft")

    def record(self, id: int, fields: dict[str, Any], where: str) -> Record:
        """The row as a Record, without the default system prompt. Raises DataError naming its origin ``where``."""
        view = renamed(fields, self.columns, self.ignored)
        try:
            self._check_keys(view)
            refuse_row_keys(view, self.format, self.forced)
            record = READERS[self.format](view)
            record = record if record.kind in ("text", "labels") else weighed(record, view)
            return replace(record, id=id, fields=fields)
        except Unfit as error:
            raise DataError(f"row {id} of {where.rpartition(':')[0]} {error.what}", where, error.todo) from None

    def with_system(self, record: Record) -> Record:
        """The record with the system prompt in front, if it is a conversation without one."""
        has_one = bool(record.messages) and record.messages[0].role == "system"
        if not self.system or has_one or record.kind in ("text", "labels"):
            return record
        return replace(record, messages=(Message("system", self.system), *record.messages))

    def _check_keys(self, view: dict[str, Any]) -> None:
        found = recognise(view)
        if found == self.format or (self.forced and any(keys <= view.keys() for keys in LAYOUTS[self.format])):
            return
        if found is not None and not self.forced:
            raise Unfit(
                f"is {found}, but the rows before it are {self.format}",
                "One source holds one format: split the file, or bring its rows into one layout.",
            )
        lacking = " and no ".join(sorted(min((keys - view.keys() for keys in LAYOUTS[self.format]), key=len)))
        raise Unfit(
            f"has no {lacking}, which the format {self.format} needs",
            "Complete or remove the row, or name columns with data.columns.",
        )


def renamed(fields: dict[str, Any], columns: dict[str, str], ignored: Iterable[str] = ()) -> dict[str, Any]:
    """The row under our names, without empty cells (null, NaN) and ignored columns."""
    taken = {theirs: ours for ours, theirs in columns.items()}
    view = {key: value for key, value in fields.items() if key not in taken and key not in columns}
    view |= {taken[key]: value for key, value in fields.items() if key in taken}
    return {key: value for key, value in view.items() if not missing(value) and key not in ignored}


def recognise(view: dict[str, Any]) -> str | None:
    """The layout that these keys stand for; a label that is a class and no feedback makes no layout of an instruction."""
    keys = set(view)
    if not {"text", "messages", "conversations"} & keys and not {"prompt", "completion"} <= keys:
        keys -= {mark for mark in FEEDBACK if not isinstance(view.get(mark), bool)}
    return next((name for name, sets in LAYOUTS.items() if any(marks <= keys for marks in sets)), None)


def layout_of(
    first: dict[str, Any],
    where: str,
    setting: str,
    columns: dict[str, str],
    system: str | None,
    ignored: tuple[str, ...] = (),
) -> Layout:
    """The layout of a source from its first row. Raises ConfigError for wrong settings, DataError for unknown keys."""
    for ours, theirs in columns.items():
        if ours not in NAMES:
            raise ConfigError(
                f'data.columns renames to "{ours}", which no format knows',
                f"data.columns={{{ours}: {theirs}}}",
                nearest(ours, NAMES),
            )
        if theirs not in first:
            raise ConfigError(
                f'data.columns names a column "{theirs}" that the rows do not have', where, nearest(theirs, first)
            )
    for name in ignored:
        if name not in first and name not in NAMES:
            raise ConfigError(
                f'data.ignore names a column "{name}" that the rows do not have', where, nearest(name, [*first, *NAMES])
            )
    if setting != "auto":
        return Layout(setting, columns, system, forced=True, ignored=ignored)
    view = renamed(first, columns, ignored)
    found = recognise(view)
    if found is None:
        raise _unknown(first, view, where)
    return Layout(found, columns, system, ignored=ignored)


def _unknown(first: dict[str, Any], view: dict[str, Any], where: str) -> DataError:
    keys = ", ".join(first) or "none"
    if {"question", "answer"} <= view.keys():
        return DataError(
            "question and answer may be a prompt with its response, or a problem with its gold answer: say which",
            where,
            "data.columns='{prompt: question, completion: answer}' or data.columns='{prompt: question, answer: answer}'",
        )
    if "instruction" in view or "prompt" in view:
        ours = "output" if "instruction" in view else "completion"
        return DataError(
            f"the first row has no response (its keys: {keys})",
            where,
            f"Give it a column {ours}, or name it: data.columns='{{{ours}: NAME}}'.",
        )
    return DataError(
        f"cannot tell the format of rows with the keys: {keys}",
        where,
        f"Name the columns with data.columns, or the format with data.format={'|'.join(LAYOUTS)}.",
    )
