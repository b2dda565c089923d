"""Token cleaning with a fixed reference model, or with the model itself as it was a round before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.errors import CheckpointError, ConfigError, DataError
from ftrun.registry import register
from ftrun.runs.artifacts import digest
from ftrun.select.run import written_beside
from ftrun.tokens.reference import ComparesWithReference, own_scoring
from ftrun.tokens.run import write_tokens
from ftrun.tokens.step_ranking import descending
from ftrun.training.scoring import Scoring

if TYPE_CHECKING:
    from ftrun.data.tokens import TokenTable
    from ftrun.training.context import Context
    from ftrun.training.parts import Loop


@register("tokens", "token_cleaning")
@dataclass
class TokenCleaning(ComparesWithReference):
    """Train only tokens on which a better model is better (Pang et al., 2025, arXiv:2502.01968).

    score = nll under the model before training - nll under a reference, the same model fine-tuned on good rows. Of all
    N trained tokens the ``int(k * N)`` highest keep their loss, the others lose it; they stay in the input. Equal
    scores go to the earlier token. Training starts from the base model, not from the reference.

    ``mode=self_evolving`` needs no reference. The rows are cut into ``rounds`` chunks in the order of the file, trained
    one after the other: the first with all its tokens, which gives theta_0; then chunk i with the ``int(k * N_i)`` of
    its N_i tokens of the highest nll under the model before training - nll under theta_{i-1}.
    """

    mode: Literal["fixed", "self_evolving"] = "fixed"  # what is compared with: a reference, or the model a round before
    k: float = 0.6  # share of the trained tokens that is kept
    level: Literal["global", "sample"] = "global"  # one ranking over all rows (of a chunk), or one in each row
    rounds: int = 5  # self_evolving: chunks that the rows are cut into (n in the paper)

    needs: ClassVar[dict[str, str]] = {"token_loss": "leaves tokens out of the loss"}
    static: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.k <= 1:
            raise ConfigError(f"tokens.k is a share above 0 and up to 1, not {self.k}", f"tokens.k={self.k}")
        if self.rounds < 2:
            raise ConfigError("tokens.rounds must be at least 2", f"tokens.rounds={self.rounds}")
        if self.mode == "self_evolving" and self.reference:
            raise ConfigError(
                "tokens.mode=self_evolving makes its own references",
                f"tokens.reference={self.reference}",
                "Leave tokens.reference out, or use tokens.mode=fixed.",
            )
        self._begun = self.rounds  # chunks whose tokens are decided: all of them where another run's weights are used

    def precompute(self, table: TokenTable, ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        """In the self-evolving mode all tokens still weigh what they did: each round decides when it begins."""
        if self.mode == "self_evolving":
            return self._base_losses(table, ctx)
        scores = self.excess_losses(table, ctx)
        kept = self._kept(scores, table)
        if not kept.any():
            trained = int((~np.isnan(scores)).sum())
            raise DataError(
                f"token_cleaning keeps none of {trained} trained tokens", f"tokens.k={self.k}", "Raise tokens.k."
            )
        return scores, np.where(kept, table.loss_weight, 0).astype(np.float32)

    def _kept(self, scores: np.ndarray, table: TokenTable) -> np.ndarray:
        samples = table.offsets[np.append(~table.continues, True)]  # pieces of one text are one sample
        return highest(scores, self.k, samples if self.level == "sample" else None)

    # ---- self-evolving ----

    def order(self, table: TokenTable) -> np.ndarray | None:
        """The chunk of every row, (rows,)."""
        if self.mode == "fixed":
            return None
        return np.arange(len(table)) * self.rounds // len(table)

    def _base_losses(self, table: TokenTable, ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        if len(table) < self.rounds:
            raise DataError(
                f"{len(table)} rows cannot be cut into {self.rounds} chunks",
                f"tokens.rounds={self.rounds}",
                "Lower tokens.rounds, or give more rows.",
            )
        base = own_scoring(ctx)
        self._base_nll = base.token_nll(table, "score with the model")
        base.discard()
        self._scores = np.full(len(table.input_ids), np.nan, np.float32)
        self._begun = 1  # the first chunk keeps all its tokens
        ctx.report.note(f"{self.rounds} rounds: the tokens of each chunk are chosen when training gets there")
        return self._scores, np.asarray(table.loss_weight)

    def before_step(self, step: int, trainer: Loop) -> None:
        """Begin the rounds whose first row this step draws: their tokens are scored with the model as it is now."""
        if self.mode == "fixed":
            return
        if trainer.plan.begin:
            raise ConfigError(
                "tokens.mode=self_evolving trains the rows in the order of the file, and the picker has an order too",
                f"picker={trainer.ctx.settings.choice('picker')}",
                "Use another picker, or tokens.mode=fixed.",
            )
        if self._begun < self.rounds and len(self._scores) != len(trainer.table.input_ids):
            raise ConfigError(
                "tokens.mode=self_evolving scores all rows, and another token method leaves some of them out",
                f"tokens=[{','.join(trainer.ctx.settings.choices('tokens'))}]",
                "Use tokens.mode=fixed, or token_cleaning alone.",
            )
        chunk = self.order(trainer.table)
        assert chunk is not None
        before = self._begun
        while self._begun < self.rounds:
            rows = np.flatnonzero(chunk == self._begun)
            first = int(rows[0]) // trainer.plan.batch_size
            if first > step:
                break
            self._begin(rows, trainer, passed=first < step)
            self._begun += 1
        if self._begun > before and trainer.team.rank == 0:
            write_tokens(trainer.ctx.out / "selection" / "tokens.parquet", trainer.table, self._scores)

    def _begin(self, rows: np.ndarray, trainer: Loop, passed: bool) -> None:
        """Decide the tokens of a chunk. ``passed``: its round has begun already, in a run that goes on now."""
        table, number = trainer.table, self._begun
        file = trainer.ctx.out / "selection" / "rounds" / f"round-{number}.npy"
        mine = slice(int(table.offsets[rows[0]]), int(table.offsets[rows[-1] + 1]))  # its tokens, which are neighbours
        part = table.rows(rows)
        if passed:
            scores = _read(file, mine.stop - mine.start)
        else:
            now = replace(trainer.bundle, fingerprint=digest([trainer.bundle.fingerprint, number]))
            scoring = Scoring(lambda: now, trainer.team, trainer.ctx.report, trainer.ctx.settings.select.batch_tokens)
            nll = scoring.token_nll(part, f"score chunk {number + 1} of {self.rounds}")
            scores = self._base_nll[mine] - nll
            if trainer.team.rank == 0:
                with written_beside(file) as beside, beside.open("wb") as out:
                    np.save(out, scores)
        kept = self._kept(scores, part)
        weights = np.array(table.loss_weight)
        weights[mine] = np.where(kept, part.loss_weight, 0)
        trainer.table = table.with_weights(weights)
        self._scores[mine] = scores
        trainer.ctx.report.note(
            f"round {number + 1} of {self.rounds}: {int(kept.sum())} of {int((~np.isnan(scores)).sum())} tokens are kept"
        )


def highest(scores: np.ndarray, k: float, offsets: np.ndarray | None = None) -> np.ndarray:
    """Mask of the ``int(k * n)`` highest of n scores, ties to the earlier; NaN is no score.

    With ``offsets`` (samples + 1,) each sample is ranked by itself.
    """
    kept = np.zeros(len(scores), bool)
    bounds = [0, len(scores)] if offsets is None else offsets.tolist()
    for first, end in pairwise(bounds):
        order = first + descending(scores[first:end])
        kept[order[: int(k * len(order))]] = True
    return kept


def _read(file: Path, tokens: int) -> np.ndarray:
    try:
        scores = np.load(file)
    except (OSError, ValueError):
        scores = np.zeros(0)
    if len(scores) != tokens:
        raise CheckpointError(
            "the scores of a round that has begun are gone", str(file), "Start a new run: they cannot be made again."
        )
    return scores
