"""The selection stage: score, filter, pick, and write down what was chosen and why."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ftrun.config.values import parse_budget
from ftrun.errors import ConfigError, DataError
from ftrun.runs.artifacts import disk_guard, write_json, written_together
from ftrun.select.audit import Audit, audit, rows_to_keep
from ftrun.select.base import Budget, Picker, Scorer, Table
from ftrun.select.content import Content
from ftrun.select.dedup import THRESHOLD, duplicates
from ftrun.select.geometry.nearest import comparing_scorers
from ftrun.select.order import picker_of
from ftrun.select.scoring.shared import Shared
from ftrun.select.scoring.token_scores import TOKEN_SCORES
from ftrun.training.scoring import Scoring

if TYPE_CHECKING:
    from ftrun.config.settings import Settings
    from ftrun.data.pool import Pool
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

NAMED_IDS = 20  # rows that summary.json names a reason
FILES = ("lengths.parquet", "audit.parquet", "examples.jsonl", "scores.parquet", "selected.jsonl", "summary.json")
EMBEDDINGS = "embeddings.npy"  # where the scorer made some and they are not too many
SOMETIMES = (EMBEDDINGS, TOKEN_SCORES)


@dataclass
class Selected:
    """What a selection chose. ``ids`` are places in the pool, best first, (picked,)."""

    ids: np.ndarray
    table: Table


def run_selection(
    settings: Settings,
    pool: Pool,
    load: Callable[[], Bundle],
    ctx: Context,
    tokenizer: Any = None,
    shared: Shared | None = None,
) -> Selected:
    """Choose rows of the pool as the config says and write selection/ into the run folder.

    ``load`` gives the model that scores; without need of it only its ``tokenizer`` is used. With ``shared``, finished
    texts stay until the caller discards them.

    Raises ConfigError for a missing or useless budget, DataError when nothing is picked.
    """
    scorer: Scorer = settings.component("select")
    picker = picker_of(settings)
    budget = _budget(settings, scorer, picker, len(pool))
    folder = ctx.selection
    ctx.scoring = Scoring(
        load, ctx.team, ctx.report, settings.select.batch_tokens, folder / "shards", own_tokenizer=tokenizer
    )
    if shared:
        ctx.scoring = shared.engine(settings, ctx.scoring)
    try:
        table = _score(scorer, pool, ctx)
        picked = _pick(settings, scorer, picker, table, budget, ctx)
        picked = ctx.team.gather_object(picked)[0]  # clustering may round differently elsewhere: rank 0 decides
        selected = Selected(picked, table)
        admitted = scorer.keep(table)
        _check(settings, scorer, budget, table, admitted, selected, ctx)
        if ctx.team.rank == 0:
            content = shared.content if shared else Content(pool, settings.seed)
            _write(folder, settings, pool, selected, admitted, scorer.column, content, ctx)
        if not shared:
            ctx.scoring.discard()
    finally:
        ctx.scoring = None
    return selected


def check_budget(settings: Settings, rows: int) -> None:
    """Refuse a budget that the selection cannot work with. Raises ConfigError."""
    _budget(settings, settings.component("select"), picker_of(settings), rows)


def _budget(settings: Settings, scorer: Scorer, picker: Picker, rows: int) -> Budget:
    """The budget in rows or tokens; all rows where the picker does without."""
    name = settings.choice("select")
    if picker.needs_scores and not scorer.column:
        raise ConfigError(
            f"picker={settings.choice('picker')} ranks by a score, and select={name} gives none",
            todo="Choose a scorer: select=random.",
        )
    if picker.needs_similarity and not scorer.gives_similarity:
        raise ConfigError(
            f"picker={settings.choice('picker')} picks rows near your queries, and select={name} compares with none",
            f"select={name} select.picker={settings.choice('picker')}",
            f"Use {comparing_scorers()}, with select.queries=[dev.jsonl]; or another picker.",
        )
    wanted = parse_budget(settings.budget)
    if wanted is None:
        if picker.budget_use == "required":
            raise ConfigError(
                f"select={name} needs a budget: how much of the pool to take",
                todo="Set budget=0.1 (a share), budget=500 (rows) or budget=1M_tokens.",
            )
        return Budget(rows=rows)
    if picker.budget_use == "none":
        raise ConfigError(
            f"budget={settings.budget} has no effect: select={name} takes every row",
            todo="Choose a selector, select=random for one, or leave the budget out.",
        )
    unit, amount = wanted
    if unit == "tokens":
        return Budget(tokens=int(amount))
    # 0.29 * 100 is 28.999999999999996 in floating point
    return Budget(rows=int(amount * rows + 1e-9) if unit == "share" else int(amount))


def _score(scorer: Scorer, pool: Pool, ctx: Context) -> Table:
    columns = {name: np.asarray(values, np.float64) for name, values in scorer.score(pool, ctx).items()}
    reasons = ctx.scorer.reasons
    if scorer.column:
        values = columns[scorer.column]
        for place in np.flatnonzero(np.isinf(values)).tolist():
            reasons.setdefault(place, "its score is infinite")
        columns[scorer.column] = np.where(np.isinf(values), np.nan, values)
        unscored = set(np.flatnonzero(np.isnan(columns[scorer.column])).tolist())
        reasons = {place: reasons.get(place, "undefined") for place in sorted(unscored)}
    return Table(columns, ctx.scorer.row_tokens(pool), pool, ctx.scorer.embeddings, ctx.scorer.similarity, reasons)


def _pick(settings: Settings, scorer: Scorer, picker: Picker, table: Table, budget: Budget, ctx: Context) -> np.ndarray:
    unscored = _unscored(scorer, table)
    scored = scorer.keep(table) & ~unscored
    last = np.flatnonzero(unscored) if settings.select.unscored == "keep" else np.zeros(0, np.int64)
    if settings.select.dedup:
        eligible = np.union1d(np.flatnonzero(scored), last)  # a row that cannot be picked stands for none that can
        table.duplicate_of = duplicates(table, eligible, settings.select.dedup, settings.select.dedup_threshold, ctx)
        scored &= table.duplicate_of < 0
        last = last[table.duplicate_of[last] < 0]
    candidates = np.flatnonzero(scored)
    picked = np.zeros(0, np.int64)
    if len(candidates):
        picked = np.asarray(picker.pick(table, candidates, scorer.column, budget, ctx), np.int64)
    if len(last):
        picked = budget.take(np.concatenate([picked, last]), table.lengths)
    return picked


def _unscored(scorer: Scorer, table: Table) -> np.ndarray:
    return np.isnan(table.columns[scorer.column]) if scorer.column else np.zeros(len(table), bool)


def _check(
    settings: Settings,
    scorer: Scorer,
    budget: Budget,
    table: Table,
    admitted: np.ndarray,
    selected: Selected,
    ctx: Context,
) -> None:
    """Refuse an empty choice, and say when the budget is not met."""
    unscored = _unscored(scorer, table)
    dropped = 0 if settings.select.unscored == "keep" else int(unscored.sum())
    filtered = int((~admitted & ~unscored).sum())
    repeated = _repeated(table)
    left = len(table) - dropped - filtered - repeated
    counts = (
        f"{len(table)} rows: {dropped} without a score, {filtered} left out by the method's filter, "
        f"{f'{repeated} near-duplicates, ' if repeated else ''}{left} to pick from"
    )
    if not len(selected.ids):
        reasons = Counter(table.reasons.values()).most_common(1)
        todo = "Raise the budget, or loosen the bounds of the picker."
        if dropped and reasons:
            todo = f"Most common reason: {reasons[0][0]}."
        elif not left:
            todo = f"No row passes that filter: `ftrun show recipe={settings.recipe or '...'}` says what it admits."
        raise DataError(f"select={settings.choice('select')} picks nothing", counts, todo)
    if budget.rows is not None and settings.budget is not None and budget.rows > left:
        ctx.report.warn(
            f"budget={settings.budget} asks for {budget.rows} rows, {len(selected.ids)} are picked. {counts}"
        )
    if (
        budget.tokens is not None
        and budget.tokens > int(table.lengths[selected.ids].sum())
        and len(selected.ids) == left
    ):
        have = int(table.lengths[selected.ids].sum())
        ctx.report.warn(f"budget={settings.budget} asks for {budget.tokens} tokens, {have} are picked. {counts}")


# ---- what is written ----


def _write(
    folder: Path,
    settings: Settings,
    pool: Pool,
    selected: Selected,
    admitted: np.ndarray,
    column: str,
    content: Content,
    ctx: Context,
) -> None:
    """All files of the stage, or none: they are made in a folder of their own and moved when they are all there."""
    table, ids = selected.table, selected.ids
    rank = np.zeros(len(table), np.int64)
    rank[ids] = np.arange(1, len(ids) + 1)
    number = pa.array(pool.ids, pa.int64())
    scores = {
        "id": number,
        **{name: pa.array(values, pa.float64()) for name, values in table.columns.items()},
        "selected": pa.array(rank > 0),
        "rank": pa.array(rank, pa.int64(), mask=rank == 0),
    }
    if table.duplicate_of is not None:
        scores["duplicate_of"] = pa.array(pool.ids[table.duplicate_of], pa.int64(), mask=table.duplicate_of < 0)
    found: Audit = audit(table, ids, admitted, content)
    summary: dict[str, Any] = _summary(settings, pool, selected, admitted) | {"column": column or None} | found.facts
    names = FILES if found.embeddings is None else (*FILES, EMBEDDINGS)
    with written_together(folder, names) as beside:
        if found.embeddings is not None:
            np.save(beside / EMBEDDINGS, found.embeddings, allow_pickle=False)
        pq.write_table(found.columns, beside / "audit.parquet")
        _write_rows(beside / "selected.jsonl", pool, pool.ids[ids])
        _write_rows(beside / "examples.jsonl", pool, pool.ids[rows_to_keep(table, column, rank)])
        pq.write_table(pa.table(scores), beside / "scores.parquet")
        pq.write_table(
            pa.table({"id": number, "tokens": pa.array(table.lengths, pa.int64())}), beside / "lengths.parquet"
        )
        write_json(beside / "summary.json", summary)
    ctx.report.note(
        f"selected {summary['picked']:,} of {summary['pool']:,} rows, {summary['tokens']:,} tokens; "
        f"{summary['unscored']['rows']:,} without a score, {summary['filtered']:,} left out by the filter"
        + (f", {summary['duplicates']['rows']:,} near-duplicates left out" if "duplicates" in summary else "")
    )


def _write_rows(path: Path, pool: Pool, ids: np.ndarray) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in ids.tolist():
            file.write(json.dumps(_chosen_row(pool.fields(number), number), ensure_ascii=False) + "\n")


def _chosen_row(fields: dict[str, Any], number: int) -> dict[str, Any]:
    """The row unchanged plus its number; an id of its own is kept beside it."""
    own = {} if fields.get("id", number) == number else {"original_id": fields["id"]}
    return {**fields, **own, "id": number}


def _summary(settings: Settings, pool: Pool, selected: Selected, admitted: np.ndarray) -> dict[str, Any]:
    table = selected.table
    reasons: dict[str, list[int]] = {}
    for place, reason in table.reasons.items():
        reasons.setdefault(reason, []).append(int(pool.ids[place]))
    unscored = np.zeros(len(table), bool)
    unscored[list(table.reasons)] = True
    return {
        "select": settings.choice("select"),
        "picker": settings.choice("picker"),
        "budget": settings.budget,
        "pool": len(table),
        "unscored": {
            "rows": len(table.reasons),
            "reasons": {why: {"rows": len(ids), "ids": ids[:NAMED_IDS]} for why, ids in sorted(reasons.items())},
        },
        "filtered": int((~admitted & ~unscored).sum()),
        **_duplicates(settings, table),
        "picked": len(selected.ids),
        "tokens": int(table.lengths[selected.ids].sum()),
    }


def _repeated(table: Table) -> int:
    return 0 if table.duplicate_of is None else int((table.duplicate_of >= 0).sum())


def _duplicates(settings: Settings, table: Table) -> dict[str, Any]:
    method = settings.select.dedup
    if method is None:
        return {}
    threshold = settings.select.dedup_threshold
    used = THRESHOLD[method] if threshold is None else threshold
    return {"duplicates": {"by": method, "threshold": used, "rows": _repeated(table)}}


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A place to write ``path``, which then appears whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
