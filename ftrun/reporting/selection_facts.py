"""A selection read back from its folder, and the numbers that its page shows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ftrun.reporting.choice import score_column
from ftrun.reporting.run import Run
from ftrun.reporting.shares import Share, shares_of

MOST_SOURCES = 18  # more are joined by what stands before the first slash
OTHERS = "all others"


@dataclass
class Choice:
    """What one method chose. All arrays are (rows of the pool,), in the order of scores.parquet."""

    name: str
    run: Run

    @cached_property
    def ids(self) -> np.ndarray:
        return self.run.scores["id"]

    @cached_property
    def picked(self) -> np.ndarray:
        return self.run.scores["selected"].astype(bool)

    @cached_property
    def rank(self) -> np.ndarray:
        """From 1; NaN where a row was not picked."""
        return self.run.scores["rank"].astype(float)

    @cached_property
    def column(self) -> str | None:
        return score_column(self.run) if self.run.selection.get("column") else None

    @cached_property
    def score(self) -> np.ndarray:
        """What rows were ranked by; NaN where there is none."""
        return self.run.scores[self.column].astype(float) if self.column else np.full(len(self.ids), np.nan)

    @cached_property
    def tokens(self) -> np.ndarray:
        lengths = self.run.row_lengths
        return np.full(len(self.ids), np.nan) if lengths is None else lengths

    @cached_property
    def random(self) -> np.ndarray:
        """A random choice of as many tokens, bool."""
        return self.run.audit["random"].astype(bool)

    @cached_property
    def admitted(self) -> np.ndarray:
        return self.run.audit["admitted"].astype(bool)

    @cached_property
    def repeats(self) -> np.ndarray:
        """The row that each is a near-duplicate of and was left out for; NaN for none."""
        found = self.run.scores.get("duplicate_of")
        return np.full(len(self.ids), np.nan) if found is None else found.astype(float)

    @cached_property
    def eligible(self) -> np.ndarray:
        """Rows that the picker could take, bool."""
        return self.admitted & np.isnan(self.repeats)

    @cached_property
    def cluster(self) -> np.ndarray:
        """Cluster of every row, (rows,); -1 for rows whose words were not read."""
        return np.nan_to_num(self.run.audit["cluster"].astype(float), nan=-1).astype(np.int64)

    @cached_property
    def sampled(self) -> np.ndarray:
        """Rows that have a cluster, bool."""
        return self.cluster >= 0

    @property
    def cluster_names(self) -> list[str]:
        return [str(name) for name in self.run.selection["clusters"]["names"]]

    @property
    def clustered_by(self) -> str:
        return str(self.run.selection["clusters"]["by"])

    @cached_property
    def cutoff(self) -> float:
        """The lowest score that was picked; NaN without one."""
        inside = self.score[self.picked & np.isfinite(self.score)]
        return float(inside.min()) if len(inside) else float("nan")

    @cached_property
    def follows_score(self) -> bool:
        """Whether the highest scores were taken: no eligible row that was left out scores above the cut-off."""
        return not (self.eligible & ~self.picked & (self.score > self.cutoff)).any()

    def unscored(self) -> dict[str, np.ndarray]:
        """Reason and positions of the rows without a score, the most common reason first."""
        reasons = self.run.audit["reason"]
        found: dict[str, list[int]] = {}
        for at, reason in enumerate(reasons.tolist()):
            if reason is not None:
                found.setdefault(str(reason), []).append(at)
        return {why: np.array(rows) for why, rows in sorted(found.items(), key=lambda item: -len(item[1]))}

    def by_cluster(self) -> list[Share]:
        read = self.sampled
        return shares_of(self.cluster_names, self.cluster[read], self.picked[read], self.random[read])

    def by_source(self) -> list[Share]:
        """Shares of the sources, the largest first; empty when rows name none."""
        said = self.run.audit["source"]
        known = np.array([isinstance(name, str) for name in said.tolist()])
        if not known.any():
            return []
        names = np.where(known, said, "no source").astype(str)
        if len(np.unique(names)) > MOST_SOURCES:
            names = np.array([name.partition("/")[0] for name in names.tolist()])
        distinct, group, counts = np.unique(names, return_inverse=True, return_counts=True)
        place = np.empty(len(distinct), np.int64)
        order = np.argsort(-counts, kind="stable")
        place[order] = np.minimum(np.arange(len(distinct)), MOST_SOURCES)
        shown = [str(distinct[at]) for at in order[:MOST_SOURCES]]
        shown += [OTHERS] if len(distinct) > MOST_SOURCES else []
        return shares_of(shown, place[group], self.picked, self.random)


def read_choices(out: Path) -> list[Choice]:
    """The selections of a run folder: its own, or one of each recipe. Empty when nothing was chosen."""
    single = Run(out)
    if single.selection:
        return [Choice(_name(single, out), single)]
    folders = [path.parent for path in sorted((out / "selection").glob("*/summary.json"))]
    named = str(single.config.get("recipe") or "").split(",")
    folders.sort(key=lambda path: named.index(path.name) if path.name in named else len(named))
    return [Choice(path.name, Run(path, selection_in=".")) for path in folders]


def _name(run: Run, out: Path) -> str:
    return str(run.config.get("recipe") or run.selection.get("select") or out.name)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Rows that both chose, as a share of those that either chose."""
    either = int((one | other).sum())
    return float((one & other).sum() / either) if either else float("nan")


def jaccard_by_chance(one: int, other: int, rows: int) -> float:
    """What two random choices of these sizes have in common on average."""
    both = one * other / rows
    return both / (one + other - both)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation over the rows that both score, ties by their mean rank; NaN where a side does not vary."""
    known = np.isfinite(one) & np.isfinite(other)
    ranks = [_ranks(values[known]) for values in (one, other)]
    if known.sum() < 2 or any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
