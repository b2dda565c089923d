"""A run folder read as far as it was written: a run that failed early has a report too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow.parquet as parquet
import yaml

from ftrun.reporting.changes import Change, changes, number, same_rows
from ftrun.reporting.paired import paired_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T = TypeVar("T")
LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d {2}")


@dataclass
class Run:
    """Contents of a run folder. What is absent is empty; what cannot be read is named in ``unreadable``."""

    path: Path
    unreadable: list[str] = field(default_factory=list)
    selection_in: str = "selection"  # folder of the selection, below path
    evaluated_in: str = "eval"  # folder of the results, below path

    @cached_property
    def config_text(self) -> str:
        return self._read("config.yaml", lambda file: file.read_text(encoding="utf-8"), "")

    @cached_property
    def config(self) -> dict[str, Any]:
        return self._read("config.yaml", lambda file: _mapping(yaml.safe_load(self.config_text)), {})

    @cached_property
    def lock(self) -> dict[str, Any]:
        return self._json("lock.json")

    @cached_property
    def summary(self) -> dict[str, Any]:
        return self._json("summary.json")

    @cached_property
    def changes(self) -> list[Change]:
        before, after = self.earlier, self.predictions()
        paired = {name: paired_errors(before[name], rows) for name, rows in after.items() if name in before}
        return changes(*self._results, paired)

    @cached_property
    def earlier(self) -> dict[str, list[dict[str, Any]]]:
        """Predictions before training of the evaluators that asked the same rows afterwards."""
        other = {
            name for name, metrics in self._results[1].items() if not same_rows(self._results[0].get(name), metrics)
        }
        return {name: rows for name, rows in self.predictions(before=True).items() if name not in other}

    @cached_property
    def _results(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Metrics before training and after it."""
        before, after = (self._json(f"{self.evaluated_in}/{name}.json") for name in ("before", "results"))
        return before, after

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl by step; of a step trained twice (after resuming) the later line counts."""
        lines: dict[tuple[float, bool], dict[str, Any]] = {}
        for line in self._jsonl("train/metrics.jsonl"):
            step = number(line.get("step"))
            if np.isfinite(step):
                lines[step, "loss" in line] = lines.get((step, "loss" in line), {}) | line
        return [line for _, line in sorted(lines.items(), key=lambda item: item[0])]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one key of the metrics, both (lines that have it,); NaN where it is not a number."""
        pairs = [(number(line["step"]), number(line[key])) for line in self.metrics if key in line]
        return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """Columns of scores.parquet."""
        return self._columns(f"{self.selection_in}/scores.parquet")

    @cached_property
    def selection(self) -> dict[str, Any]:
        return self._json(f"{self.selection_in}/summary.json")

    @cached_property
    def row_lengths(self) -> np.ndarray | None:
        """Tokens of the rows of ``scores``, in their order, (rows,), NaN where unknown; None when nobody counted them."""
        columns = self._columns(f"{self.selection_in}/lengths.parquet")
        if not {"id", "tokens"} <= columns.keys():
            return None
        order = np.argsort(columns["id"], kind="stable")
        known, wanted = columns["id"][order], self.scores["id"]
        if not len(known):
            return np.full(len(wanted), np.nan)
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[place] == wanted, columns["tokens"][order][place].astype(float), np.nan)

    @cached_property
    def audit(self) -> dict[str, np.ndarray]:
        """Columns of audit.parquet, rows in the order of ``scores``."""
        return self._columns(f"{self.selection_in}/audit.parquet")

    def rows(self, ids: Collection[int]) -> dict[int, dict[str, Any]]:
        """These rows by id, as far as they were chosen or kept as examples of those that were not."""
        wanted, found = set(ids), {}
        for name in (f"{self.selection_in}/examples.jsonl", f"{self.selection_in}/selected.jsonl"):
            for row in self._read(name, lambda file, name=name: self._lines(file, name), iter(())):
                identity = number(row.get("id"))
                if identity in wanted:
                    found[int(identity)] = row
        return found

    @cached_property
    def tokens(self) -> dict[str, np.ndarray]:
        """Columns of tokens.parquet, the tokens themselves left out."""
        return self._columns(f"{self.selection_in}/tokens.parquet", without="token")

    @cached_property
    def token_columns(self) -> dict[str, np.ndarray]:
        """Columns of tokens.parquet with the tokens."""
        return self._columns("selection/tokens.parquet")

    @cached_property
    def token_roles(self) -> dict[str, dict[str, float]]:
        """Tokens, kept tokens and sum of weights of every role, as tokens.parquet says."""

        def read(file: Path) -> dict[str, dict[str, float]]:
            return json.loads((parquet.read_schema(file).metadata or {}).get(b"roles", b"{}"))

        return self._read("selection/tokens.parquet", read, {})

    @cached_property
    def token_weights(self) -> list[dict[str, Any]]:
        """Lines of token_weights.jsonl: how the token policy weighed in every step."""
        return self._jsonl("train/token_weights.jsonl")

    def token_rows(self, ids: Collection[int]) -> dict[str, np.ndarray]:
        """All columns of tokens.parquet for these rows."""
        return self._columns(f"{self.selection_in}/tokens.parquet", filters=[("id", "in", list(ids))])

    def scored_tokens(self, ids: Collection[int]) -> dict[str, np.ndarray]:
        """What the scorer said of the tokens of these rows: all columns of token_scores.parquet."""
        return self._columns(f"{self.selection_in}/token_scores.parquet", filters=[("id", "in", list(ids))])

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer saved with the adapter or the model; None when the run did not get so far."""
        from tokenizers import Tokenizer

        for name in ("adapter/tokenizer.json", "model/tokenizer.json"):
            if (self.path / name).is_file():
                return self._read(name, lambda file: Tokenizer.from_str(file.read_text(encoding="utf-8")), None)
        return None

    def predictions(self, before: bool = False) -> dict[str, list[dict[str, Any]]]:
        """Predictions of every evaluator, after training or before it."""
        folder = Path(self.evaluated_in) / ("predictions/before" if before else "predictions")
        files = sorted((self.path / folder).glob("*.jsonl"))
        return {file.stem: self._jsonl(str(folder / file.name)) for file in files}

    @cached_property
    def log(self) -> list[str]:
        """Messages of ftrun.log without their times."""
        text = self._read("ftrun.log", lambda file: file.read_text(encoding="utf-8", errors="replace"), "")
        return [LOG_LINE.sub("", line) for line in text.splitlines()]

    @property
    def warnings(self) -> list[str]:
        return list(dict.fromkeys(line.removeprefix("warning: ") for line in self.log if line.startswith("warning: ")))

    # reading

    def _read(self, name: str, reader: Callable[[Path], T], empty: T) -> T:
        file = self.path / name
        if not file.is_file():
            return empty
        try:
            return reader(file)
        except (OSError, ValueError, yaml.YAMLError, KeyError) as error:
            self._unreadable(f"{name}: {' '.join(str(error).split())[:200]}")
            return empty

    def _json(self, name: str) -> dict[str, Any]:
        return self._read(name, lambda file: _mapping(json.loads(file.read_text(encoding="utf-8"))), {})

    def _jsonl(self, name: str) -> list[dict[str, Any]]:
        return self._read(name, lambda file: list(self._lines(file, name)), [])

    def _lines(self, file: Path, name: str) -> Iterator[dict[str, Any]]:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for index, line in enumerate(lines, start=1):
                try:
                    if line.strip():
                        yield _mapping(json.loads(line))
                except ValueError:  # the last line of a run that was killed
                    self._unreadable(f"{name}: line {index} is not whole")

    def _columns(
        self, name: str, without: str | None = None, filters: list[Any] | None = None
    ) -> dict[str, np.ndarray]:
        def read(file: Path) -> dict[str, np.ndarray]:
            names = [column for column in parquet.read_schema(file).names if column != without]
            table = parquet.read_table(file, columns=names, filters=filters)
            return {column: table[column].to_numpy(zero_copy_only=False) for column in names}

        return self._read(name, read, {})

    def _unreadable(self, text: str) -> None:
        if text not in self.unreadable:
            self.unreadable.append(text)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not an object")
    return value
