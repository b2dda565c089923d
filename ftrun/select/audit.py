"""What is kept of a selection besides scores, so that its choice can be looked into later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ftrun.select.base import Budget, Table
from ftrun.select.content import Content

STORED_VALUES = 50_000_000  # numbers of embeddings that a run folder keeps, 100 MB; more are not stored
EACH = 10  # rows of a group
AUDITED = 20  # rows of a group on the page of the selection alone
REASONS, ROWS_A_REASON = 8, 10  # rows without a score whose text is kept


@dataclass
class Audit:
    """``columns``: audit.parquet; ``facts``: what summary.json says of them; ``embeddings``: (rows, width) float16."""

    columns: pa.Table
    facts: dict[str, Any]
    embeddings: np.ndarray | None


def audit(table: Table, ids: np.ndarray, admitted: np.ndarray, content: Content) -> Audit:
    """Filter, reason for no score, source, cluster of every row, and a random choice of as many tokens as ``ids``.

    ``ids``: places of the picked rows. ``admitted``: (rows,) bool, rows that the method's filter lets pass.
    """
    tokens = int(table.lengths[ids].sum())
    order = np.argsort(content.chance, kind="stable")
    chance = np.zeros(len(table), bool)
    chance[Budget(tokens=tokens).take(order, table.lengths)] = True
    clusters = content.clusters(table.embeddings)
    columns = pa.table(
        {
            "id": pa.array(content.pool.ids, pa.int64()),
            "admitted": pa.array(admitted),
            "random": pa.array(chance),
            "cluster": pa.array(clusters.label, pa.int32(), mask=clusters.label < 0),
            "source": pa.array(content.pool.sources, pa.string()),
            "reason": _reasons(table),
        }
    )
    facts = {"clusters": {"by": clusters.by, "names": clusters.names, "rows": clusters.rows}}
    kept = table.embeddings is not None and table.embeddings.size <= STORED_VALUES
    embeddings = np.asarray(table.embeddings, np.float16) if kept else None
    return Audit(columns, facts, embeddings)


def _reasons(table: Table) -> pa.Array:
    """Why each row has no score, (rows,) text; null where it has one."""
    if not table.reasons:
        return pa.nulls(len(table), pa.string())
    return pa.array([table.reasons.get(place) for place in range(len(table))], pa.string())


def rows_to_keep(table: Table, column: str, rank: np.ndarray) -> np.ndarray:
    """Places of the rows whose text the reports show, in the order of the pool."""
    groups = [np.zeros(0, np.int64)]
    if column:
        ranks = np.where(rank > 0, rank, np.nan)
        groups += example_rows(rank > 0, table.columns[column], ranks, AUDITED).values()
    by_reason: dict[str, list[int]] = {}
    for place, reason in table.reasons.items():
        by_reason.setdefault(reason, []).append(place)
    common = sorted(by_reason.values(), key=lambda places: -len(places))[:REASONS]
    groups += [np.array(places[:ROWS_A_REASON], np.int64) for places in common]
    return np.unique(np.concatenate(groups))


def example_rows(
    selected: np.ndarray, score: np.ndarray, rank: np.ndarray | None = None, each: int = EACH, once: bool = True
) -> dict[str, np.ndarray]:
    """Positions worth reading, by heading; with ``once`` no row twice. The selection stage keeps the text of these rows.

    selected: (rows,) bool. score: (rows,), higher is better, NaN is left out. rank: (rows,) place of the picked rows.
    each: rows of a group at most.
    """
    order = np.argsort(-score, kind="stable")
    order = order[np.isfinite(score[order])]
    inside, outside = order[selected[order]], order[~selected[order]]
    if not len(inside):
        return {"Lowest scores": outside[-each:]}
    lowest = score[inside[-1]]
    best = inside if rank is None else inside[np.argsort(rank[inside], kind="stable")]
    under = outside[score[outside] <= lowest]
    groups = {
        "Best of the choice": best[:each],
        "Around the cut": np.concatenate([inside[-each // 2 :], under[: each // 2]]) if len(under) else inside[:0],
        "Left out although they score higher": outside[score[outside] > lowest][: each // 2],
        "Lowest scores": order[-each:],
    }
    shown: set[int] = set()
    for heading, rows in groups.items() if once else ():
        groups[heading] = np.array([row for row in rows.tolist() if row not in shown], dtype=np.int64)
        shown |= set(rows.tolist())
    return groups
