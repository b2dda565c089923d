"""Long answers that are as long as their prompt asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.select.base import Scorer, Table
from ftrun.select.row_numbers import row_numbers
from ftrun.select.scoring.lengths import check_patterns, demanded_lengths, length_score, text_length

if TYPE_CHECKING:
    from ftrun.data.pool import Pool
    from ftrun.training.context import Context


@register("select", "long_output_min")
@dataclass
class LongOutputMin(Scorer):
    """Rows that state one length and keep it, and some general rows (Chen et al., 2024, arXiv:2410.10210).

    A prompt that states exactly one length is a long row; with r = length of the answer / stated length,

        S_L = 100 max(0, 1 - (r - 1) / 3) for r > 1, else 100 max(0, 1 - (1 / r - 1) / 2)

    and rows with S_L >= minimum stay: from 29% too short to 60% too long. Chinese counts characters, other languages
    words. Rows that state no length are general: ``general`` of them for every long row are kept, drawn by content.
    Rows that state several lengths are left out. Long rows rank first, by S_L.
    """

    minimum: float = 80.0  # lowest length score of a long row
    general: float = 20.0  # rows without a stated length for every long row that stays
    shortest: int = 0  # lowest stated length that makes a row a long one
    patterns: list[str] = field(default_factory=list)  # regular expressions of further demands; group 1 is the number

    column: ClassVar[str] = "long_output_min"

    def __post_init__(self) -> None:
        check_patterns(self.patterns, "select.patterns")
        if self.general < 0:
            raise ConfigError("select.general must not be negative", f"select.general={self.general:g}")

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """Rank value, length score, stated length and length, (rows,) each.

        The rank value is S_L for long rows, 0 to 1 for general ones (a row's draw), and NaN for what cannot be either.
        """
        rank, score, required, length = (np.full(len(pool), np.nan) for _ in range(4))
        draws = row_numbers(pool, ctx.seed, "long_output_min")
        for row, record in enumerate(pool):
            if not record.response:
                ctx.scorer.reasons[row] = "no response"
                continue
            length[row] = text_length(record.response)
            asked = "\n".join(message.content for message in record.prompt if message.role == "user")
            demands = demanded_lengths(asked, self.patterns)
            if len(demands) > 1:
                ctx.scorer.reasons[row] = "states several lengths"
            elif not demands:
                rank[row] = draws[row]
            elif min(demands) < self.shortest:
                ctx.scorer.reasons[row] = f"states a length below shortest={self.shortest}"
            else:
                required[row] = demands.pop()
                score[row] = rank[row] = length_score(int(length[row]), int(required[row]))
        kept = self.keep(Table({"long_output_min": rank, "required": required}, np.zeros(len(pool), np.int64)))
        long = int((kept & ~np.isnan(required)).sum())
        general, wanted = int(kept.sum()) - long, int(self.general * long + 1e-9)
        ctx.report.note(
            f"{long} of {int((~np.isnan(required)).sum())} rows that state a length keep it; {general} general rows "
            f"come with them{f' of {wanted} wanted: the pool has no more' if general < wanted else ''}"
        )
        if not long:
            ctx.report.warn(
                "no row states a length and keeps it: nothing is picked, since general rows come with long ones"
            )
        return {"long_output_min": rank, "length_score": score, "required": required, "length": length}

    def keep(self, table: Table) -> np.ndarray:
        """Long rows that keep to their length, and the highest draws among the general ones."""
        rank, long = table.columns["long_output_min"], ~np.isnan(table.columns["required"])
        kept = long & (rank >= self.minimum)
        general = np.flatnonzero(~long & ~np.isnan(rank))
        wanted = int(self.general * kept.sum() + 1e-9)
        kept[general[np.argsort(-rank[general], kind="stable")][:wanted]] = True
        return kept
