"""As much of a pool as evaluators ask of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ftrun.data.records import Record


@dataclass
class Rows:
    records: list[Record]

    @property
    def ids(self) -> np.ndarray:
        return np.arange(len(self.records))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, id: int) -> Record:
        return self.records[id]

    def origin(self, id: int) -> str:
        return f"rows.jsonl:{id + 1}"
