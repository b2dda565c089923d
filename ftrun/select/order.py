"""The order in which training sees the rows, where a selection has a say in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from ftrun.errors import ConfigError
from ftrun.select.base import Picker, Scorer

if TYPE_CHECKING:
    from ftrun.config.settings import Settings
    from ftrun.data.tokens import TokenTable
    from ftrun.training.context import Context


def picker_of(settings: Settings) -> Picker:
    """The picker that picks: that of the scorer's paper where nobody chose another."""
    picker: Picker = settings.component("picker")
    return picker.stands_for(settings.component("select"))


def training_order(table: TokenTable, ctx: Context) -> list[np.ndarray]:
    """Row positions in ``table`` of the first passes of training, by the scores that the selection has written.

    Empty for a picker that leaves the order to training. Raises ConfigError when rows are not those of the pool.
    """
    settings = ctx.settings
    picker = picker_of(settings)
    if not picker.orders:
        return []
    if settings.component("tokens").edits:
        raise ConfigError(
            f"picker={settings.choice('picker')} says in which order the rows of the pool train, and "
            f"tokens={settings.choice('tokens')} makes other rows of them",
            todo="Use tokens=none, or another picker.",
        )
    scorer: Scorer = settings.component("select")
    scores = pq.read_table(ctx.selection / "scores.parquet", columns=["id", scorer.column])
    ids, values = scores["id"].to_numpy(), scores[scorer.column].to_numpy()
    by_id = np.argsort(ids)
    wanted = np.asarray(table.record[:: table.sequences_per_row])
    score = values[by_id[np.searchsorted(ids, wanted, sorter=by_id)]]
    made = picker.passes(score, settings.train.batch_size, settings.seed)
    if made:
        again = f" in {len(made)} passes" * (len(made) > 1)
        ctx.report.note(
            f"picker={type(picker).name} says which {sum(map(len, made)):,} rows come first{again}"  # type: ignore[attr-defined]
        )
    return made
