"""Labelled rows as tasks, and demonstrations drawn from the task that a query belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ftrun.data.records import Record

Label = str | int


@dataclass
class Task:
    """The rows of one task, by label."""

    name: str
    rows: list[Record] = field(default_factory=list)
    by_label: dict[Label, list[Record]] = field(default_factory=dict)

    @property
    def labels(self) -> list[Label]:
        """Sorted, so that what is drawn does not depend on the order of the rows."""
        return sorted(self.by_label, key=lambda label: (isinstance(label, str), label))


def tasks_of(records: Iterable[Record], column: str) -> list[Task]:
    """Tasks by the value of a column of the rows; rows without it are one task."""
    tasks: dict[str, Task] = {}
    for record in records:
        name = str(record.fields.get(column, ""))
        task = tasks.setdefault(name, Task(name))
        task.rows.append(record)
        assert record.label is not None
        task.by_label.setdefault(record.label, []).append(record)
    return list(tasks.values())


def text_of(record: Record) -> str:
    """What a labelled row says, both texts of a pair."""
    return record.text if record.text_pair is None else f"{record.text}\n{record.text_pair}"


def generator_of(record: Record, draw: int, seed: int) -> np.random.Generator:
    """A generator that follows from what the row says, the number of the draw and the seed."""
    content = hashlib.blake2b(f"{text_of(record)}\0{record.label}".encode(), digest_size=8).digest()
    return np.random.default_rng([seed, draw, int.from_bytes(content, "big")])


def draw_rows(
    rows: list[Record], count: int, query: Record, generator: np.random.Generator, other_labels: bool = False
) -> list[Record]:
    """Up to ``count`` different rows in random order, none with the text of the query, or with its label."""
    asked, found = text_of(query), []
    for size in (min(len(rows), 2 * count + 8), len(rows)):  # a few are almost always enough
        drawn = (rows[place] for place in generator.choice(len(rows), size, replace=False))
        found = [row for row in drawn if text_of(row) != asked and not (other_labels and row.label == query.label)]
        if len(found) >= count:
            break
    return found[:count]


def filled(template: str, text: str, label: str | None) -> str:
    """A template with its text and label; without a label what stands before it, as the end of a prompt."""
    before, _, after = template.partition("{label}")
    head = before.replace("{text}", text)
    return head.rstrip() if label is None else head + label + after
